"""Annotation at scale: the actors' answers are the library's, the file is whole or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import langcell
from langcell.census.demo import demo_adata
from langcell.census.options import CensusOptions
from langcell.config import AnnotateConfig
from langcell.errors import InputError
from langcell.inference.annotate import Calls
from langcell.inference.options import AnnotateOptions
from langcell.recipes import annotate
from langcell.recipes.annotate import run
from langcell.recipes.annotated import AnnotatedFile
from langcell.recipes.options import AnnotateJobOptions, PlaceOptions

TYPES = ["B cell", "natural killer cell", "dendritic cell"]
SCORE = AnnotateOptions(top_k=1, roll_up=0.5)


def _config(export: Path, out: Path, **asked: Any) -> AnnotateConfig:
    census = asked.pop("census", CensusOptions())
    job = AnnotateJobOptions(model=str(export), candidates=TYPES, actors=2, **asked)
    return AnnotateConfig(run=PlaceOptions(dir=str(out)), annotate=job, score=SCORE, census=census)


def _same(found: anndata.AnnData, expected: anndata.AnnData) -> None:
    """The columns that langcell.annotate writes, and the embedding."""
    langcell.annotate(expected, found.uns["where"], TYPES, top_k=1, roll_up=0.5, progress=False)
    for name in ("label", "id", "runner_up", "rolled_up"):
        assert found.obs[f"langcell_{name}"].tolist() == expected.obs[f"langcell_{name}"].tolist()
    for name in ("score", "logits1", "logits2"):
        np.testing.assert_allclose(found.obs[f"langcell_{name}"], expected.obs[f"langcell_{name}"], atol=1e-5)
    np.testing.assert_allclose(found.obsm["X_langcell"], expected.obsm["X_langcell"], atol=1e-5)


@pytest.mark.slow
def test_a_file_is_annotated_as_by_the_library(ray_session: None, export: Path, tmp_path: Path) -> None:
    cells = demo_adata()[:30].copy()
    cells.obs["cluster"] = pd.Categorical(["a"] * 20 + ["b"] * 10)
    cells.layers["counts"] = cells.X.copy()
    cells.obsm["X_pca"] = np.ones((30, 2))
    cells.write_h5ad(tmp_path / "study.h5ad")
    summary = run(
        _config(export, tmp_path / "out", data=str(tmp_path / "study.h5ad"), chunk=7, cluster="cluster")
    )
    found = anndata.read_h5ad(tmp_path / "out" / "annotated.h5ad")
    assert (found.X != cells.X).nnz == 0
    assert "X_pca" in found.obsm
    assert found.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    assert len(set(found.obs["langcell_majority"])) <= 2
    found.uns["where"] = str(export)
    _same(found, cells)
    assert summary["cells"] == 30
    assert summary["genes"] == 765
    assert sum(summary["labels"].values()) == 30
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert (tmp_path / "out" / "annotated.png").read_bytes()[:4] == b"\x89PNG"
    # Again over its own result: columns are replaced, not doubled.
    again = run(_config(export, tmp_path / "out2", data=str(tmp_path / "out" / "annotated.h5ad")))
    assert again["labels"] == summary["labels"]


@pytest.mark.slow
def test_a_census_query_is_annotated_as_by_the_library(
    ray_session: None, export: Path, tmp_path: Path
) -> None:
    census = CensusOptions(
        uri="demo", filter="cell_type == 'B cell'", slice_nnz=5000, dir=str(tmp_path / "census")
    )
    summary = run(_config(export, tmp_path / "out", census=census))
    found = anndata.read_h5ad(tmp_path / "out" / "annotated.h5ad")
    whole = demo_adata()
    expected = whole[whole.obs["cell_type"] == "B cell"].copy()
    assert found.obs["soma_joinid"].tolist() == expected.obs["soma_joinid"].tolist()
    found.uns["where"] = str(export)
    _same(found, expected)
    assert summary["cells"] == 95
    assert summary["left_out"] == {}
    with pytest.raises(InputError, match=r"annotate\.cluster: of a Census one of cell_type"):
        run(_config(export, tmp_path / "c", census=census, cluster="leiden"))
    with pytest.raises(InputError, match=r"annotate\.layer is for \.h5ad files"):
        run(_config(export, tmp_path / "c", census=census, layer="raw"))
    with pytest.raises(InputError, match=r"census\.organism is mus_musculus"):
        run(_config(export, tmp_path / "mouse", census=replace(census, organism="mus_musculus")))


@pytest.mark.slow
def test_cells_of_a_folder_that_hold_no_counts_are_named_or_counted(
    ray_session: None, export: Path, tmp_path: Path
) -> None:
    """Columns in another order, one cell with half a count, one droplet without any."""
    cells = demo_adata()[:20, ::-1].copy()
    expected = cells.copy()
    dense = cells.X.toarray()
    dense[4, np.flatnonzero(dense[4])[0]] = 0.5
    dense[7] = 0
    cells.X = csr_matrix(dense)
    (tmp_path / "studies").mkdir()
    cells.write_h5ad(tmp_path / "studies" / "one.h5ad")
    census = CensusOptions(uri=str(tmp_path / "studies"), filter="", bad_cells="error")
    with pytest.raises(
        InputError,
        match=r"cells that cannot be used:\n  dataset 10x_pbmc68k_reduced, soma_joinid 4: a count is",
    ):
        run(_config(export, tmp_path / "out", census=census))
    assert not list((tmp_path / "out").glob("annotated*"))
    summary = run(_config(export, tmp_path / "out", census=replace(census, bad_cells="skip")))
    assert summary["left_out"] == {"not_integer": 1}
    found = anndata.read_h5ad(tmp_path / "out" / "annotated.h5ad")
    silent = found.obs["langcell_label"].astype(str).to_numpy() == "unassigned"
    assert np.flatnonzero(silent).tolist() == [4, 7]
    langcell.annotate(expected, str(export), TYPES, top_k=1, progress=False)
    same = ~silent
    np.testing.assert_allclose(found.obsm["X_langcell"][same], expected.obsm["X_langcell"][same], atol=1e-5)


def test_what_cannot_be_used_is_said_before_a_cluster_starts(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "bad.h5ad").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"bad\.h5ad cannot be read as \.h5ad"):
        run(_config(export, out, data=str(tmp_path / "bad.h5ad")))
    cells = demo_adata()[:5].copy()
    cells.X.data = np.log1p(cells.X.data)
    cells.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(InputError, match="log-normalised"):
        run(_config(export, out, data=str(tmp_path / "log.h5ad")))
    with pytest.raises(InputError, match=r"annotate\.cluster: obs has no column leiden; it has: soma_joinid"):
        run(_config(export, out, data=str(tmp_path / "log.h5ad"), cluster="leiden"))
    with pytest.raises(InputError, match="give one of them"):
        run(_config(export, out, candidates_file="types.txt"))
    assert not list(out.glob("*"))


def test_few_genes_of_a_census_are_warned_of(
    ray_session: None, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "studies").mkdir()
    demo_adata()[:20, :60].copy().write_h5ad(tmp_path / "studies" / "one.h5ad")
    census = CensusOptions(uri=str(tmp_path / "studies"), filter="")
    monkeypatch.setattr(annotate, "_annotate", lambda *_: {"cells": 0, "labels": {}})
    with pytest.warns(UserWarning, match=r"studies has 60 of the model's 765 genes: its sentences are short"):
        run(_config(export, tmp_path / "out", census=census))


def _calls(first: int, n: int) -> Calls:
    numbers = np.arange(first, first + n)
    score = numbers.astype(np.float32)
    term = np.full(n, "CL:0000000", object)
    return Calls(numbers, numbers, score, score, score, term, np.tile(score[:, None], 3))


def test_columns_of_nullable_texts_are_kept(tmp_path: Path) -> None:
    """They are written only where that is asked for, which was found out when all cells were annotated."""
    obs = pd.DataFrame({"note": pd.array(["a", None], "string")}, index=["c0", "c1"])
    with anndata.settings.override(allow_write_nullable_strings=True):
        anndata.AnnData(csr_matrix((2, 3), dtype=np.float32), obs=obs).write_h5ad(
            tmp_path / "given.h5ad", convert_strings_to_categoricals=False
        )
    with AnnotatedFile(tmp_path / "annotated.h5ad", tmp_path / "given.h5ad", 3) as file:
        file.put(0, _calls(0, 2))
        file.finish(pd.DataFrame({"x": file.calls.score}), "langcell", {})
    found = anndata.read_h5ad(tmp_path / "annotated.h5ad").obs
    assert found["note"].isna().tolist() == [False, True]
    assert found["x"].tolist() == [0, 1]


def test_an_annotated_file_is_whole_or_absent(tmp_path: Path) -> None:
    obs = pd.DataFrame({"soma_joinid": range(10)}, index=[f"c{i}" for i in range(10)])
    path = tmp_path / "annotated.h5ad"
    with pytest.raises(RuntimeError, match="4 of 10 cells were not annotated"):  # noqa: PT012, SIM117
        with AnnotatedFile(path, obs, 3) as file:
            file.put(4, _calls(4, 6))
            file.finish(pd.DataFrame({"x": file.calls.score}), "langcell", {})
    assert not list(tmp_path.iterdir())
    with AnnotatedFile(path, obs, 3) as file:
        file.put(4, _calls(4, 6))
        file.put(0, _calls(0, 4))
        with pytest.raises(RuntimeError, match="annotated twice"):
            file.put(3, _calls(3, 2))
        assert file.embeddings(np.array([1, 8])).tolist() == [[1, 1, 1], [8, 8, 8]]
        file.finish(pd.DataFrame({"x": file.calls.score}), "langcell", {"model": "tiny"})
    found = anndata.read_h5ad(path)
    assert found.obs["x"].tolist() == list(range(10))
    assert found.obsm["X_langcell"][:, 0].tolist() == list(range(10))
    assert found.uns["langcell"] == {"model": "tiny"}
