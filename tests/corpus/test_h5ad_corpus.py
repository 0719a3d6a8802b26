"""Folders of .h5ad files become corpora as a Census does: three real studies, and bad cells by name."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import Vocabulary
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from tests.corpus.making import make, read_blocks

STUDIES = ("atlas_landmarks_human_counts", "ifnb_kang_pbmc_counts", "zheng_facs_pbmc_counts")
MAP = Path(__file__).parents[1] / "census" / "data" / "three_studies.yaml"


def test_three_studies_are_one_corpus(ray_session, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in STUDIES:
        (tmp_path / "in" / f"{name}.h5ad").symlink_to(shared / f"{name}.h5ad")
    summary = make(
        str(tmp_path / "in"),
        tmp_path / "out",
        ["CL:0001054", "natural killer cell"],
        census__filter="",
        census__obs_map=str(MAP),
        census__symbols=str(shared / "geneformer" / "gene_name_id_dict.pkl"),
        census__slice_nnz=2_000_000,
        tokens__max_length=2048,
    )
    assert summary.cells == 830 + 2_000 + 3_874
    assert summary.left_out == {}
    assert summary.slices >= 3
    manifest = Manifest.read(str(tmp_path / "out"))
    assert set(manifest.recipe["census"]["files"]) == {f"{name}.h5ad" for name in STUDIES}
    assert summary.genes_left_out["without_id"] == sum(
        manifest.coverage["source"]["genes_without_id"].values()
    )

    # The third study by an independent road: anndata, pandas, numpy; its joinids follow those of the others.
    cells = read_blocks(tmp_path / "out")
    beta = Beta.read(str(tmp_path / "out" / "beta.parquet"))
    vocabulary = Vocabulary.read(str(tmp_path / "out" / "vocabulary.json"))
    median_of, cls = dict(zip(beta.feature_id, beta.beta, strict=True)), vocabulary.cls
    zheng = anndata.read_h5ad(shared / f"{STUDIES[2]}.h5ad")
    order = np.argsort(zheng.var_names.to_numpy(), kind="stable")  # var of a corpus is in the order of ids
    genes = zheng.var_names.to_numpy()[order]
    token = {gene: i + 2 for i, gene in enumerate(vocabulary.gene_ids)}
    for row in range(0, zheng.n_obs, 50):
        counts = np.asarray(zheng.X[row].todense(), np.float64).ravel()
        value = counts[order] / counts.sum() * 1e4 / np.array([median_of.get(g, np.nan) for g in genes])
        found = np.flatnonzero(value > 0)
        ranked = found[np.argsort(-value[found], kind="stable")]
        assert cells[830 + 2_000 + row][1] == [cls, *(token[genes[i]] for i in ranked)][:2048]
        held = zheng.obs["celltype"].iloc[row] in ("CD14+ Monocyte", "CD56+ NK")
        assert (cells[830 + 2_000 + row][0] == "held_out") == held


def study(path: Path, bad: dict[int, float], n: int = 40, genes: int = 30) -> None:
    """A file of n cells; in row i, the first count is bad[i]."""
    dense = np.random.default_rng(len(path.name)).poisson(1.0, (n, genes)).astype(np.float32) + 1
    for row, value in bad.items():
        dense[row, 0] = value
    obs = pd.DataFrame({"cell_type": ["B cell"] * n}, index=[f"cell {i}" for i in range(n)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(genes)])
    anndata.AnnData(sp.csr_matrix(dense), obs, var).write_h5ad(path)


def test_bad_cells_of_a_file_are_named_by_study_and_joinid(ray_session, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    study(tmp_path / "in" / "a.h5ad", {})
    study(tmp_path / "in" / "b_second.h5ad", {3: -1, 5: 0.5})
    options = {"corpus__split_by": "cell", "corpus__val_share": 0.0, "corpus__test_share": 0.0}
    with pytest.raises(
        InputError, match=r"dataset b_second, soma_joinid 43: .*negative(.|\n)*soma_joinid 45"
    ):
        make(str(tmp_path / "in"), tmp_path / "out", [], **options)
    summary = make(str(tmp_path / "in"), tmp_path / "out", [], **options, census__bad_cells="skip")
    assert (summary.cells, summary.left_out) == (78, {"negative": 1, "not_integer": 1})
    # Another content under the same name is another corpus.
    study(tmp_path / "in" / "a.h5ad", {0: 9})
    with pytest.raises(InputError, match=r"another corpus(.|\n)*census\.files\.a\.h5ad"):
        make(str(tmp_path / "in"), tmp_path / "out", [], **options, census__bad_cells="skip")
