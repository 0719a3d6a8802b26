"""The supervised baseline: the counts of the right cells from every kind of source, and no dead run."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from langcell.census.options import CensusOptions
from langcell.census.source import open_source
from langcell.census.tokenised import TokenisedFolder
from langcell.recipes import tables
from langcell.recipes.tables import read_counts, supervised
from tests.corpus.test_bad_cells import BAD, N, write
from tests.corpus.test_h5ad_corpus import study
from tests.corpus.test_measuring import old_and_new  # noqa: F401
from tests.token_folders import corpus, save


def read(census: CensusOptions, joinid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `read_counts` gives of a source, dense."""
    with closing(open_source(census)) as source:
        assert not isinstance(source, TokenisedFolder)
        counts, totals, sound = read_counts(source, census, joinid)
    return counts.toarray(), totals, sound


def x_of(uri: str, joinid: np.ndarray) -> np.ndarray:
    """Rows of X, dense, by TileDB-SOMA alone."""
    with soma.open(f"{uri}/census_data/homo_sapiens/ms/RNA/X/raw") as x_raw:
        whole = x_raw.read().coos(shape=x_raw.shape).concat().to_scipy().tocsr()
    return whole[joinid].toarray()


def test_counts_come_in_the_order_of_the_cells(ray_session, demo_uri, monkeypatch) -> None:
    monkeypatch.setattr(tables, "TASK_NNZ", 20_000)  # several tasks
    joinid = np.random.default_rng(0).permutation(700)[:400]
    counts, totals, sound = read(CensusOptions(uri=demo_uri), joinid)
    np.testing.assert_array_equal(counts, x_of(demo_uri, joinid))
    with soma.open(f"{demo_uri}/census_data/homo_sapiens/obs") as obs:
        raw_sum = obs.read(column_names=["soma_joinid", "raw_sum"]).concat().sort_by("soma_joinid")["raw_sum"]
    np.testing.assert_array_equal(totals, raw_sum.to_numpy()[joinid])
    assert sound.all()


def test_a_release_that_tells_neither_lengths_nor_totals_is_measured(ray_session, request) -> None:
    old, _ = request.getfixturevalue("old_and_new")
    joinid = np.array([250, 3, 77])
    counts, totals, sound = read(CensusOptions(uri=old), joinid)
    np.testing.assert_array_equal(counts, x_of(old, joinid))
    np.testing.assert_array_equal(totals, x_of(old, joinid).sum(axis=1))
    assert sound.all()


def test_cells_that_cannot_be_used_are_left_out_with_their_place(ray_session, tmp_path: Path) -> None:
    uri = write(tmp_path / "census", BAD)
    joinid = np.array([80, 299, 10, 90, 0])  # 90 is bad for want of a token alone
    counts, totals, sound = read(CensusOptions(uri=uri), joinid)
    assert sound.tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(counts, x_of(uri, joinid[sound]))
    assert len(totals) == 3


def test_files_are_read_by_the_joinids_of_their_folder(ray_session, tmp_path: Path) -> None:
    study(tmp_path / "a.h5ad", {})
    study(tmp_path / "b_second.h5ad", {3: -1})
    joinid = np.array([79, 43, 5])
    counts, totals, sound = read(CensusOptions(uri=str(tmp_path), filter=""), joinid)
    files = [anndata.read_h5ad(tmp_path / name).X.toarray() for name in ("a.h5ad", "b_second.h5ad")]
    assert sound.tolist() == [True, False, True]
    np.testing.assert_array_equal(counts, np.concatenate(files)[[79, 5]])
    np.testing.assert_array_equal(totals, counts.sum(axis=1))


def halves(uri: str) -> tuple[pa.Table, np.ndarray, list[str]]:
    """Cells of a source to learn from, and others with their types."""
    with closing(open_source(CensusOptions(uri=uri))) as source:
        source_obs = source.obs(["cell_type"])
    cells = pa.table({"soma_joinid": source_obs["soma_joinid"], "term": source_obs["cell_type"]})
    other = cells.take(np.arange(1, len(cells), 2))
    return cells.take(np.arange(0, len(cells), 2)), other["soma_joinid"].to_numpy(), other["term"].to_pylist()


def test_the_baseline_learns_the_types(ray_session, demo_uri) -> None:
    train, joinid, types = halves(demo_uri)
    figures = supervised(CensusOptions(uri=demo_uri), train, joinid, types, seed=0)
    assert figures is not None
    assert figures["accuracy"] > 0.8
    # Types of other cells: the figures are those of chance, so cells and types belong together above.
    shuffled = np.random.default_rng(0).permutation(types).tolist()
    wrong = supervised(CensusOptions(uri=demo_uri), train, joinid, shuffled, seed=0)
    assert wrong is not None
    assert wrong["accuracy"] < 0.4


def test_bad_cells_take_their_types_with_them(ray_session, tmp_path: Path) -> None:
    """Whatever type is given to a cell whose counts are none, the figures stay."""
    uri = write(tmp_path / "census", BAD)
    train = pa.table({"soma_joinid": np.arange(0, 150), "term": ["a", "b"] * 75})
    joinid, types = np.arange(150, N), np.array(["a", "b"] * 75)
    lies = ["no type" if i in BAD and i != 90 else term for i, term in enumerate(train["term"].to_pylist())]
    told = [
        supervised(
            CensusOptions(uri=uri),
            train.set_column(1, "term", pa.array(terms)),
            joinid,
            types.tolist(),
            seed=0,
        )
        for terms in (train["term"].to_pylist(), lies)
    ]
    assert told[0] is not None
    assert told[0] == told[1]


@pytest.mark.parametrize("release", ["old", "new"])
def test_counts_that_cannot_be_read_any_more_cost_the_baseline_alone(
    ray_session, request, tmp_path: Path, capsys, release: str
) -> None:
    uri = request.getfixturevalue("old_and_new")[release == "new"]
    damaged = tmp_path / "census"
    shutil.copytree(uri, damaged)
    for data in damaged.glob("census_data/homo_sapiens/ms/RNA/X/raw/__fragments/*/a0.tdb"):
        data.write_bytes(data.read_bytes()[:-20])
    train = pa.table({"soma_joinid": np.arange(100), "term": ["a", "b"] * 50})
    census = CensusOptions(uri=str(damaged), attempts=1)
    assert supervised(census, train, np.arange(100, 120), ["a"] * 20, seed=0) is None
    said = capsys.readouterr().out
    assert "no logistic regression beside `seen`: " in said
    assert ("cannot be measured: " if release == "old" else "cannot be read: ") in said
    census.uri = str(tmp_path / "gone")
    assert supervised(census, train, np.arange(100, 120), ["a"] * 20, seed=0) is None
    assert str(tmp_path / "gone") in capsys.readouterr().out


def test_of_sentences_alone_there_is_no_baseline(tmp_path: Path, capsys) -> None:
    save(tmp_path / "in", corpus(40, columns={"cell_type": ["B cell"] * 40}))
    train = pa.table({"soma_joinid": np.arange(10), "term": ["a", "b"] * 5})
    census = CensusOptions(uri=str(tmp_path / "in"))
    assert supervised(census, train, np.arange(10, 20), ["a"] * 10, seed=0) is None
    assert capsys.readouterr().out == ""
