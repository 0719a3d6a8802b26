"""The embedded mini Census: real cells in the layout of a Census release.

A release is hundreds of gigabytes on S3, so a first try of anything that reads one would start with
a network and a wait. This module writes 700 real cells into a SOMA collection of the same layout
(Census schema 2.4.0: names, column order and types, dictionaries, filters, tiles), so that
`cellxgene_census.open_soma(uri=...)` and every line behind it run on it as on a release.

The cells are the 10x Genomics "Fresh 68k PBMCs (Donor A)" (3' v1 chemistry; Zheng et al. 2017,
doi:10.1038/ncomms14049) in the subset that scanpy's wheel carries as `10x_pbmc68k_reduced.h5ad`:
700 cells, 765 genes, ten labels assigned by correlation with purified populations. What is known of
them, and what is not:

- The file holds ln(1 + x * 1e4 / n) to three decimals, n the cell's total over all genes measured.
  The counts x are integers and come back by rounding: none is off by more than 0.082 (checked).
- The 765 genes hold 11-28% of a cell's counts. `raw_sum` is the total n (it is what rank-value
  encoding divides by); `nnz`, `raw_mean_nnz` and `raw_variance_nnz` describe the stored row.
- The file names genes by symbol alone, and no dependency of ours maps these hg19 symbols to
  Ensembl: `feature_id` repeats the symbol, `feature_type` says `unknown`, `feature_length` is 0.
- The donor is healthy; sex and ethnicity do not come with the data and are `unknown`. `adult stage`
  says no more of a blood donor than its definition does: a sexually mature human.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from langcell.census.layout import build_whole, categorical, make_var, write_census
from langcell.errors import InputError

_TYPES = {
    "Dendritic": ("CL:0000451", "dendritic cell"),
    "CD14+ Monocyte": ("CL:0001054", "CD14-positive monocyte"),
    "CD19+ B": ("CL:0000236", "B cell"),
    "CD4+/CD25 T Reg": ("CL:0000792", "CD4-positive, CD25-positive, alpha-beta regulatory T cell"),
    "CD8+ Cytotoxic T": ("CL:0000794", "CD8-positive, alpha-beta cytotoxic T cell"),
    "CD8+/CD45RA+ Naive Cytotoxic": ("CL:0000900", "naive thymus-derived CD8-positive, alpha-beta T cell"),
    "CD56+ NK": ("CL:0000623", "natural killer cell"),
    "CD4+/CD45RO+ Memory": ("CL:0000897", "CD4-positive, alpha-beta memory T cell"),
    "CD34+": ("CL:0008001", "hematopoietic precursor cell"),
    "CD4+/CD45RA+/CD25- Naive T": ("CL:0000895", "naive thymus-derived CD4-positive, alpha-beta T cell"),
}
DEMO_TYPES: dict[str, str] = {label: term for label, (term, _) in _TYPES.items()}
"""CL id of each of the ten labels (`bulk_labels`) of scanpy's file."""

# The facets that all cells share: label, ontology id.
_SHARED = {
    "assay": ("10x 3' v1", "EFO:0009901"),
    "development_stage": ("adult stage", "HsapDv:0000258"),
    "disease": ("normal", "PATO:0000461"),
    "self_reported_ethnicity": ("unknown", "unknown"),
    "sex": ("unknown", "unknown"),
    "tissue": ("blood", "UBERON:0000178"),
    "tissue_general": ("blood", "UBERON:0000178"),
}


def build_demo(path: str) -> str:
    """Writes the mini Census to the local folder `path` unless it stands there, and returns its URI.

    Safe to call from several processes at once: the first whole one stays, the others are dropped.
    Takes about a second. Raises InputError where scanpy is not installed, RuntimeError where its
    file is not the one described above.
    """

    def write(whole: str) -> None:
        counts, obs, var = _cells()
        write_census(whole, [counts], obs, var, build="demo")

    return build_whole(path, write)


def demo_adata() -> anndata.AnnData:
    """The same cells as an AnnData: raw counts in X (float32 CSR), obs and var of the Census.

    obs has `soma_joinid`, the facets with their ontology ids and `raw_sum`; its index is the barcodes, var's
    the symbols. Raises as `build_demo`.
    """
    counts, obs, var = _cells()
    cells = obs.to_pandas().set_index("observation_joinid").rename_axis(None)
    genes = var.to_pandas().set_index("feature_id", drop=False).rename_axis(None)
    return anndata.AnnData(counts, obs=cells, var=genes)


def _source() -> Path:
    spec = importlib.util.find_spec("scanpy")
    if spec is None or spec.origin is None:
        raise InputError(
            "census.uri=demo is built from cells that the package scanpy ships, which is not "
            "installed: pip install 'langcell[demo]'"
        )
    return Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"


def _cells() -> tuple[sp.csr_matrix, pa.Table, pa.Table]:
    """Counts (float32 CSR, cells x genes), obs and var, as they will be stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata has several to give on the age of the layout
        data = anndata.read_h5ad(_source())
    counts = sp.csr_matrix(data.raw.X, dtype=np.float64)
    totals = data.obs["n_counts"].to_numpy(np.float64)
    exact = np.expm1(counts.data) * np.repeat(totals, np.diff(counts.indptr)) / 1e4
    counts.data = np.rint(exact)
    residual = np.abs(counts.data - exact).max()
    if counts.shape != (700, 765) or not residual < 0.09 or counts.data.min() < 1:
        raise RuntimeError(
            f"{_source()} is not the file this Census is made from: shape {counts.shape}, counts off "
            f"integers by up to {residual:.3f}, smallest {counts.data.min():g}"
        )
    labels = data.obs["bulk_labels"].astype(str).tolist()
    obs = _obs(totals, labels, data.obs_names.tolist())
    symbols = data.raw.var_names.tolist()
    return counts.astype(np.float32), obs, make_var(symbols, symbols)


def _obs(totals: np.ndarray, labels: list[str], barcodes: list[str]) -> pa.Table:
    n_cells = len(labels)

    def same(value: str) -> pa.Array:
        return categorical([value] * n_cells)

    def facet(name: str) -> dict[str, pa.Array]:
        label, term = _SHARED[name]
        return {name: same(label), f"{name}_ontology_term_id": same(term)}

    return pa.table(
        {
            "soma_joinid": pa.array(range(n_cells), pa.int64()),
            "dataset_id": same("10x_pbmc68k_reduced"),
            **facet("assay"),
            "cell_type": categorical([_TYPES[label][1] for label in labels]),
            "cell_type_ontology_term_id": categorical([_TYPES[label][0] for label in labels]),
            **facet("development_stage"),
            **facet("disease"),
            "donor_id": same("Donor A"),
            "is_primary_data": pa.array([True] * n_cells),
            "observation_joinid": pa.array(barcodes, pa.large_string()),
            **facet("self_reported_ethnicity"),
            **facet("sex"),
            "suspension_type": same("cell"),
            **facet("tissue"),
            "tissue_type": same("tissue"),
            **facet("tissue_general"),
            "raw_sum": totals,
        }
    )
