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

A reader never sees a half-written Census: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from langcell.errors import InputError

SCHEMA_VERSION = "2.4.0"
ORGANISM = "homo_sapiens"

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

_ZSTD9, _ZSTD19 = ({"_type": "ZstdFilter", "level": level} for level in (9, 19))
_SHUFFLED = {"filters": ["ByteShuffleFilter", _ZSTD9]}

# As the Census's builder creates X/raw (tools/cellxgene_census_builder, globals.py).
_X_CONFIG = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [_ZSTD9]},
                "soma_dim_1": {"tile": 2048, **_SHUFFLED},
            },
            "attrs": {"soma_data": _SHUFFLED},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


def build_demo(path: str) -> str:
    """Writes the mini Census to the local folder `path` unless it stands there, and returns its URI.

    Safe to call from several processes at once: the first whole one stays, the others are dropped.
    Takes about a second. Raises InputError where scanpy is not installed, RuntimeError where its
    file is not the one described above.
    """
    target = os.path.abspath(path)
    if soma.Collection.exists(target):
        return target
    counts, obs, var = _cells()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=f".{Path(target).name}-", dir=Path(target).parent)
    try:
        whole = os.path.join(scratch, "census")
        _write(whole, counts, obs, var)
        try:
            os.rename(whole, target)
        except OSError as error:
            if not soma.Collection.exists(target):  # else another process was first
                raise InputError(
                    f"cannot place the mini Census at {target}: {error.strerror}. Give another "
                    "folder (census.dir) or remove what stands there."
                ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


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
    obs = _obs(counts, totals, labels, data.obs_names.tolist())
    return counts.astype(np.float32), obs, _var(counts, data.raw.var_names.tolist())


def _obs(counts: sp.csr_matrix, totals: np.ndarray, labels: list[str], barcodes: list[str]) -> pa.Table:
    n_cells, n_genes = counts.shape
    nnz = np.diff(counts.indptr)
    rows = np.split(counts.data, counts.indptr[1:-1])

    def same(value: str) -> pa.Array:
        return _dictionary([value] * n_cells)

    def facet(name: str) -> dict[str, pa.Array]:
        label, term = _SHARED[name]
        return {name: same(label), f"{name}_ontology_term_id": same(term)}

    return pa.table(
        {
            "soma_joinid": pa.array(range(n_cells), pa.int64()),
            "dataset_id": same("10x_pbmc68k_reduced"),
            **facet("assay"),
            "cell_type": _dictionary([_TYPES[label][1] for label in labels]),
            "cell_type_ontology_term_id": _dictionary([_TYPES[label][0] for label in labels]),
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
            "nnz": pa.array(nnz, pa.int64()),
            "raw_mean_nnz": np.array([row.mean() for row in rows]),
            "raw_variance_nnz": np.array([row.var(ddof=1) for row in rows]),
            "n_measured_vars": pa.array([n_genes] * n_cells, pa.int64()),
        }
    )


def _var(counts: sp.csr_matrix, symbols: list[str]) -> pa.Table:
    n_cells, n_genes = counts.shape
    return pa.table(
        {
            "soma_joinid": pa.array(range(n_genes), pa.int64()),
            "feature_id": pa.array(symbols, pa.large_string()),
            "feature_name": pa.array(symbols, pa.large_string()),
            "feature_type": pa.array(["unknown"] * n_genes, pa.large_string()),
            "feature_length": pa.array([0] * n_genes, pa.int64()),
            "nnz": pa.array(counts.getnnz(axis=0), pa.int64()),
            "n_measured_obs": pa.array([n_cells] * n_genes, pa.int64()),
        }
    )


def _dictionary(values: list[str]) -> pa.DictionaryArray:
    """Categories as the Census stores them: large strings under the narrowest signed index."""
    encoded = pa.array(values, pa.large_string()).dictionary_encode()
    index = pa.int8() if len(encoded.dictionary) < 128 else pa.int16()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(index), encoded.dictionary)


def _write(path: str, counts: sp.csr_matrix, obs: pa.Table, var: pa.Table) -> None:
    summary = pa.table(
        {
            "soma_joinid": pa.array(range(4), pa.int64()),
            "label": ["census_schema_version", "census_build_date", "total_cell_count", "unique_cell_count"],
            "value": [SCHEMA_VERSION, "demo", str(len(obs)), str(len(obs))],
        }
    )
    matrix = counts.tocoo()
    x_raw = pa.table(
        {
            "soma_dim_0": matrix.row.astype(np.int64),
            "soma_dim_1": matrix.col.astype(np.int64),
            "soma_data": matrix.data,
        }
    )
    census: soma.Collection[Any] = soma.Collection.create(path)
    with census:
        _write_frame(census.add_new_collection("census_info"), "summary", summary)
        experiment = census.add_new_collection("census_data").add_new_collection(ORGANISM, soma.Experiment)
        _write_frame(experiment, "obs", obs)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _write_frame(rna, "var", var)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=counts.shape, platform_config=_X_CONFIG
        )
        raw.write(x_raw)


def _write_frame(
    parent: soma.Collection[Any] | soma.Experiment | soma.Measurement, name: str, table: pa.Table
) -> None:
    """Writes a SOMA DataFrame of the builder's tuning.

    The array is closed after its creation and opened again: a dictionary column written through a
    child of a parent that is still open loses its categories (tiledbsoma 2.3), silently, and every
    value filter then matches nothing.
    """
    numbers = [f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    others = [name for name in table.column_names if name not in numbers]
    attributes: dict[str, Any] = {name: _SHUFFLED for name in numbers if name != "soma_joinid"}
    attributes.update((name, {"filters": [_ZSTD19]}) for name in others)
    config = {
        "tiledb": {
            "create": {
                "capacity": 2**16,
                "dims": {"soma_joinid": {"filters": ["DoubleDeltaFilter", _ZSTD19]}},
                "attrs": attributes,
                "offsets_filters": ["DoubleDeltaFilter", _ZSTD19],
                "allows_duplicates": True,
            }
        }
    }
    frame = parent.add_new_dataframe(
        name, schema=table.schema, domain=[[0, len(table) - 1]], platform_config=config
    )
    uri = frame.uri
    frame.close()
    with soma.DataFrame.open(uri, "w") as writer:
        writer.write(table)
    with soma.DataFrame.open(uri) as reader:
        for field in table.schema:
            if pa.types.is_dictionary(field.type):
                value = table[field.name][0].as_py()
                found = reader.read(value_filter=f'{field.name} == "{value}"', column_names=["soma_joinid"])
                if len(found.concat()) != table[field.name].to_pylist().count(value):
                    raise RuntimeError(f"{uri}: column {field.name} lost its categories on the way to disk")
