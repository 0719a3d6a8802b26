"""Sentences that others made: a sentence is what a plain loop gives, whatever the layout."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langcell.cells.vocabulary import Vocabulary
from langcell.census.slices import Slice, make_slices
from langcell.census.token_files import TokenFiles
from langcell.census.tokenised import TokenisedFolder, TokenReader
from langcell.errors import InputError
from langcell.text.options import FACETS
from tests.token_folders import ALL, CLS, GENES, LAYOUTS, Write, corpus, expected, opened, save, unpacked


def read_all(folder: TokenisedFolder, max_nnz: int, max_length: int = 2048) -> list[list[int] | None]:
    reader = pickle.loads(pickle.dumps(folder.reader_for(GENES, max_length)))
    return [cell for part in make_slices(folder.obs([]), max_nnz) for cell in unpacked(reader(part))]


@LAYOUTS
@pytest.mark.parametrize("max_nnz", [40, 700, 10**6])
def test_every_layout_gives_every_sentence(tmp_path: Path, write: Write, max_nnz: int) -> None:
    table = corpus()
    write(tmp_path / "c", table)
    folder = opened(tmp_path / "c")
    ids = table["input_ids"].to_pylist()
    assert read_all(folder, max_nnz, 20) == [expected(cell, 20) for cell in ids]
    obs = folder.obs([])
    assert obs["soma_joinid"].to_pylist() == list(range(len(table)))
    assert obs["nnz"].to_pylist() == [len(cell) for cell in ids]
    assert obs.schema.field("nnz").type == pa.int64()
    assert np.isnan(obs["raw_sum"].to_numpy()).all()


@LAYOUTS
def test_the_filter_selects_cells_and_keeps_their_rows(tmp_path: Path, write: Write) -> None:
    rare = ["rare" if i % 37 == 5 else "common" for i in range(1_000)]
    table = corpus(1_000, columns={"cell_type": rare, "n_counts": np.arange(1_000.0)})
    write(tmp_path / "c", table)
    folder = opened(tmp_path / "c", 'cell_type == "rare" and n_counts > 100')
    rows = [i for i in range(101, 1_000) if i % 37 == 5]
    obs = folder.obs(["n_counts", "cell_type"])
    assert obs["soma_joinid"].to_pylist() == rows == obs["n_counts"].to_pylist()
    ids = table["input_ids"].to_pylist()
    assert obs["nnz"].to_pylist() == [len(ids[row]) for row in rows]
    assert read_all(folder, 100) == [expected(ids[row], 2048) for row in rows]


def test_a_row_group_is_decoded_in_parts(tmp_path: Path) -> None:
    table = corpus(3_000)
    pq.write_table(table, tmp_path / "one.parquet")
    folder = opened(tmp_path)
    assert read_all(folder, 10_000) == [expected(cell, 2048) for cell in table["input_ids"].to_pylist()]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.list_(pa.uint16()),
        pa.large_list(pa.int32()),
        pa.list_(pa.int32(), 6),
    ],
    ids=str,
)
@LAYOUTS
def test_integers_of_any_width_are_tokens(tmp_path: Path, write: Write, kind: pa.DataType) -> None:
    cells = [[2, 3, 4, 5, 6, 7], [CLS, 9, 8, 0, 0, 0], [5, CLS, 0, 0, 0, 0], [3, None, 4, 0, 0, 0], None] * 8
    table = pa.table({"input_ids": pa.array(cells, kind)})
    write(tmp_path / "c", table)
    assert read_all(opened(tmp_path / "c"), 30) == [expected(cell, 2048) for cell in cells]


@given(
    cells=st.lists(
        st.lists(st.sampled_from([-1, 0, 0, 1, 2, 3, 17, CLS - 1, CLS, CLS + 1, 2**16 + 5])), min_size=1
    ),
    max_length=st.integers(2, 5),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sentence_holds_genes_or_does_not_fit(
    tmp_path: Path, cells: list[list[int]], max_length: int
) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    save(tmp_path / "c", pa.table({"input_ids": pa.array(cells, pa.list_(pa.int64()))}), shards=1, batch=3)
    joinid = np.arange(len(cells))
    part = Slice(0, 0, len(cells), pa.table({"soma_joinid": joinid}), 0)
    got = TokenReader(TokenFiles.open(tmp_path / "c"), CLS, max_length)(part)
    assert unpacked(got) == [expected(cell, max_length) for cell in cells]


def test_a_sentence_has_room_for_a_gene(tmp_path: Path) -> None:
    save(tmp_path / "c", corpus())
    with pytest.raises(InputError, match=r"tokens\.max_length is 1"):
        opened(tmp_path / "c").reader_for(GENES, 1)


def test_a_task_carries_marks_not_an_index(tmp_path: Path) -> None:
    save(tmp_path / "c", corpus(5_000), shards=1, batch=1)
    folder = opened(tmp_path / "c")
    assert len(pickle.dumps(folder.reader_for(GENES, 2048))) < 5_000 * 1.5 + 2_000
    assert folder.reader_for(GENES, 2048).files.mark_row[:3].tolist() == [0, 16, 32]


@LAYOUTS
def test_the_release_pins_every_byte(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "c", corpus())
    release = opened(tmp_path / "c").release
    assert release.keys() == {"uri", "filter", "organism", "files", "obs_map"}
    assert (release["uri"], release["filter"]) == (str(tmp_path / "c"), ALL)
    assert json.loads(json.dumps(release)) == release
    assert len(release["files"]) == 3
    for name, digest in release["files"].items():
        data = (tmp_path / "c" / name).read_bytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == digest


def test_genecorpus_loads_whole(tmp_path: Path, shared: Path) -> None:
    source = shared / "genecorpus_500_tokens.parquet"
    shutil.copy(source, tmp_path)
    vocabulary = Vocabulary.load(str(shared / "geneformer" / "token_dictionary.pkl"))
    folder = opened(tmp_path)
    reader = folder.reader_for(vocabulary, 2048)
    ids = pq.read_table(source)["input_ids"].to_pylist()
    got = [cell for part in make_slices(folder.obs(list(FACETS)), 100_000) for cell in unpacked(reader(part))]
    assert len(got) == 500
    assert vocabulary.cls == 25_426
    assert got == [[25_426, *cell][:2048] for cell in ids]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = corpus(2_500, columns={"cell_type": ["T cell", "B cell"] * 1_250, "n": np.arange(2_500)})
    data = datasets.Dataset(table).class_encode_column("cell_type")
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    splits = {"z": data.select(range(1_000)), "a": data.select(range(1_000, 2_500))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    (tmp_path / "hub").mkdir()
    data.to_parquet(tmp_path / "hub" / "train.parquet")
    ids = table["input_ids"].to_pylist()
    for name in ("saved", "dict", "hub"):
        folder = opened(tmp_path / name)
        obs = folder.obs(["cell_type", "n"])
        assert obs["cell_type"].to_pylist() == table["cell_type"].to_pylist()
        assert obs["n"].to_pylist() == list(range(2_500))
        assert read_all(folder, 5_000) == [expected(cell, 2048) for cell in ids]
    data.filter(lambda row: row["n"] % 3 == 0).save_to_disk(tmp_path / "chosen")  # by way of an indices table
    assert read_all(opened(tmp_path / "chosen"), 5_000) == [expected(cell, 2048) for cell in ids[::3]]
