"""Sentences that others made become a corpus: the same splits, texts and blocks, only nothing is ranked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langcell.cells.beta import Beta
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from tests.corpus.making import make, read_blocks
from tests.token_folders import CLS, GENES, corpus, expected, save


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options that name the vocabulary and the medians of `corpus()`."""
    folder = tmp_path_factory.mktemp("given")
    GENES.write(str(folder / "vocabulary.json"))
    ones = np.ones(len(GENES.gene_ids), np.float32)
    Beta(GENES.gene_ids, GENES.gene_ids, ones.astype(np.int64), ones).write(str(folder / "beta.parquet"))
    return {
        "tokens__vocabulary": str(folder / "vocabulary.json"),
        "beta__source": str(folder / "beta.parquet"),
    }


def sentences(n: int) -> pa.Table:
    """Sentences with a cell type, by which one is held out; none is empty."""
    types = ["B cell", "natural killer cell", "CD14-positive monocyte"]
    table = corpus(2 * n, columns={"cell_type": [types[i // 2 % 3] for i in range(2 * n)]})
    whole = [len(expected(ids, 200) or []) > 1 for ids in table["input_ids"].to_pylist()]
    return table.filter(pa.array(whole)).slice(0, n)


def test_a_datasets_folder_becomes_a_corpus(ray_session, tmp_path, given) -> None:
    table = sentences(200)
    save(tmp_path / "in", table)
    summary = make(str(tmp_path / "in"), tmp_path / "out", **given, census__slice_nnz=900)
    assert (summary.cells, summary.left_out, summary.genes) == (200, {}, len(GENES.gene_ids))
    assert summary.slices > 2
    cells = read_blocks(tmp_path / "out")
    term = {
        "B cell": "CL:0000236",
        "natural killer cell": "CL:0000623",
        "CD14-positive monocyte": "CL:0001054",
    }
    for i, row in enumerate(table.to_pylist()):
        assert cells[i][1] == expected(row["input_ids"], 200)
        assert cells[i][4] == term[row["cell_type"]]
        assert (cells[i][0] == "held_out") == (row["cell_type"] == "CD14-positive monocyte")
    manifest = Manifest.read(str(tmp_path / "out"))
    assert set(manifest.recipe["census"]["files"]) == {f"data-{i:05d}-of-00003.arrow" for i in range(3)}
    again = make(str(tmp_path / "in"), tmp_path / "out", **given, census__slice_nnz=900)
    assert again.skipped == summary.slices


def test_tokens_of_another_vocabulary_are_named_or_left_out(ray_session, tmp_path, given) -> None:
    table = sentences(30)
    ids = table["input_ids"].to_pylist()
    ids[7] = [2, CLS + 1, 3]
    save(tmp_path / "in", table.set_column(0, "input_ids", pa.array(ids, pa.list_(pa.int32()))))
    with pytest.raises(InputError, match=r"dataset in, soma_joinid 7: .*no token of the vocabulary"):
        make(str(tmp_path / "in"), tmp_path / "out", **given)
    summary = make(str(tmp_path / "in"), tmp_path / "out", **given, census__bad_cells="skip")
    assert (summary.cells, summary.left_out) == (29, {"no_token": 1})


def test_whose_tokens_they_are_must_be_said(ray_session, tmp_path, given) -> None:
    save(tmp_path / "in", sentences(30))
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        with pytest.raises(InputError, match=r"tokens\.vocabulary.*beta\.source"):
            make(str(tmp_path / "in"), tmp_path / "out", **rest)


def test_genecorpus_loads_as_a_corpus(ray_session, shared: Path, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(shared / "genecorpus_500_tokens.parquet", tmp_path / "in")
    geneformer = shared / "geneformer"
    summary = make(
        str(tmp_path / "in"),
        tmp_path / "out",
        [],
        tokens__vocabulary=str(geneformer / "token_dictionary.pkl"),
        beta__source=str(geneformer / "gene_median_dictionary.pkl"),
        tokens__max_length=2048,
    )
    assert (summary.cells, summary.genes, summary.left_out) == (500, 25_424, {})
    cells = read_blocks(tmp_path / "out")
    ids = pq.read_table(shared / "genecorpus_500_tokens.parquet")["input_ids"].to_pylist()
    assert [cells[i][1] for i in range(500)] == [[25_426, *cell][:2048] for cell in ids]
