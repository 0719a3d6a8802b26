"""Files of token sentences: what is read of them, and which are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langcell.census.slices import Slice, make_slices
from langcell.census.tokenised import TokenisedFolder
from langcell.errors import InputError
from tests.token_folders import GENES, corpus, expected, hub, opened, save, save_dict, unpacked


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def slice_of(folder: TokenisedFolder, rows: range) -> Slice:
    """The cells of some rows, given the selection of all."""
    return Slice(0, rows.start, rows.stop, folder.obs([]).slice(rows.start, len(rows)), 0)


def test_a_task_looks_at_its_own_batches_only(tmp_path: Path) -> None:
    table = corpus(400)
    save(tmp_path / "c", table, shards=1, batch=100)
    folder = opened(tmp_path / "c")
    whole = {rows: slice_of(folder, rows) for rows in (range(150), range(150, 250), range(300, 400))}
    path = tmp_path / "c" / "data-00000-of-00001.arrow"
    third = table.slice(200, 100)["input_ids"].combine_chunks().offsets.to_numpy()
    place = path.read_bytes().index((third[1:9] - third[0]).astype(np.int32).tobytes())
    overwrite(path, place, b"\xff\xff\xff\x7f" * 8)  # offsets of the third batch, far out of the file

    reader = folder.reader_for(GENES, 2048)
    ids = table["input_ids"].to_pylist()
    for rows in (range(150), range(300, 400)):
        assert unpacked(reader(whole[rows])) == [expected(ids[i], 2048) for i in rows]
    with pytest.raises(OSError, match=r"data-00000-of-00001\.arrow cannot be read"):
        reader(whole[range(150, 250)])
    with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow cannot be read.*Copy"):
        folder.obs([])


def test_obs_of_parquet_reads_no_sentence(tmp_path: Path) -> None:
    table = corpus(60)
    lengths = pa.array([max(1, len(cell)) for cell in table["input_ids"].to_pylist()])
    table = pa.table(
        {"input_ids": [cell or [2] for cell in table["input_ids"].to_pylist()], "length": lengths}
    )
    hub(tmp_path / "c", table)
    folder = opened(tmp_path / "c")
    cells = folder.obs([])
    for path in (tmp_path / "c" / "data").iterdir():
        chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
        overwrite(path, chunk.dictionary_page_offset or chunk.data_page_offset, b"\xff" * 64)
    obs = opened(tmp_path / "c").obs(["length"])
    assert obs["nnz"].to_pylist() == obs["length"].to_pylist() == lengths.to_pylist()
    with pytest.raises(OSError, match=r"train-00000-of-00003\.parquet cannot be read"):
        folder.reader_for(GENES, 2048)(make_slices(cells, 10**6)[0])


def test_a_length_that_does_not_add_up_is_not_believed(tmp_path: Path) -> None:
    table = corpus(60)
    ids = table["input_ids"].to_pylist()
    hub(tmp_path / "c", table.append_column("length", pa.array([len(cell) + 1 for cell in ids])))
    assert opened(tmp_path / "c").obs([])["nnz"].to_pylist() == [len(cell) for cell in ids]


def test_files_are_in_the_order_of_their_rows(tmp_path: Path) -> None:
    save_dict(tmp_path / "c", corpus())
    names = list(opened(tmp_path / "c").release["files"])
    assert [name.split("/")[0] for name in names] == ["train", "test", "test"]


def test_what_stands_in_a_folder_is_told(tmp_path: Path) -> None:
    for name, write in {"saved": save, "dict": save_dict, "hub": hub}.items():
        write(tmp_path / name, corpus())
        assert TokenisedFolder.stands_at(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert not TokenisedFolder.stands_at(tmp_path / "empty")
    assert not TokenisedFolder.stands_at(tmp_path / "none")


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "data-00002-of-00003.arrow"
        data = path.read_bytes()
        path.write_bytes(data[: keep(len(data))])

    return change


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: shutil.rmtree(f), r"census\.uri .*neither state\.json.*save_to_disk"),
        (lambda f: (f / "state.json").unlink(), r"census\.uri .*neither state\.json.*\.parquet"),
        (lambda f: (f / "data-00001-of-00003.arrow").unlink(), r"names data-00001-of-00003\.arrow, which is"),
        (rewrite("state.json", "{"), r"state\.json is damaged"),
        (rewrite("state.json", "{}"), r"state\.json is not what Dataset\.save_to_disk writes"),
        (rewrite("state.json", '{"_data_files": []}'), r"hold no cell"),
        (rewrite("dataset_dict.json", '{"splits": []}'), r"names no split"),
        (rewrite("dataset_dict.json", '{"splits": ["train"]}'), r"train has no state\.json"),
        (cut(lambda n: n - 8), r"data-00002-of-00003\.arrow is damaged or cut short: .*its end"),
        (cut(lambda n: n - 100), r"data-00002-of-00003\.arrow is damaged or cut short"),
        (cut(lambda n: n // 2), r"data-00002-of-00003\.arrow is damaged or cut short"),
        (cut(lambda n: 0), r"data-00002-of-00003\.arrow is damaged or cut short"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    save(tmp_path / "c", corpus())
    change(tmp_path / "c")
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "c")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"tokens": [[1]]}, r"has no column input_ids. It has: tokens.*\.h5ad"),
        ({"input_ids": ["2 3"]}, r"input_ids of .* is string; lists of integers"),
        ({"input_ids": [[2.0]]}, r"input_ids of .* is list<.*double>; lists of integers"),
        ({"input_ids": [[2]], "sex": pa.array(["male"]).dictionary_encode()}, r"dictionary column \(sex\)"),
    ],
)
def test_what_is_no_corpus_of_sentences_is_refused(
    tmp_path: Path, columns: dict[str, object], says: str
) -> None:
    save(tmp_path / "c", pa.table(columns), shards=1)
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "c")


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    hub(tmp_path / "c", corpus(60, columns={"cell_type": ["a"] * 60}))
    pq.write_table(corpus(5, columns={"sex": ["b"] * 5}), tmp_path / "c" / "z.parquet")
    says = r"z\.parquet and data/train-00000.* \(cell_type: none and string; sex: string and none\)"
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "c")
