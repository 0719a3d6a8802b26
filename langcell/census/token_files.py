"""The files of a Hugging Face `datasets` folder, and where in them a row stands.

Two layouts: what `Dataset.save_to_disk` leaves (`state.json` names Arrow IPC streams; a `DatasetDict` has
such a folder a split), and Parquet files as a hub serves them. Rows are numbered over all files in order.

A stream has no index, and a corpus of 27.5M sentences is 220 GB of int32 in batches of 1,000 rows, in
older releases of `datasets` all in one file. So opening walks over the headers of the batches once, which
are all it touches of a memory-mapped file (0.05 ms each), and marks the place of every 16th. The
marks, 1.3 bytes per 1,000 rows, are all that travels into a task: it starts at a mark, and of a batch only
the pages that it looks at are read. A Parquet footer is an index already; row groups without a wanted row
are skipped, the others decoded 1,024 rows at a time, and no column but those asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import ipc

from langcell.cells.vocabulary import MASK
from langcell.errors import InputError

TOKENS = "input_ids"
LENGTH = "length"
STATE, DICT = "state.json", "dataset_dict.json"
MARK_EVERY = 16
"""Record batches, or row groups, from one mark to the next."""
PARQUET_ROWS = 1024
"""Rows of Parquet that are decoded at a time."""

_DAMAGED = (pa.ArrowException, OSError, EOFError)


class Chosen(NamedTuple):
    """Wanted rows of a record batch. file: index of the file; rows: of the batch, int64, ascending."""

    file: int
    batch: pa.RecordBatch
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """Files of one schema and the marks in them; small, and travels by pickle.

    names: of the files, relative to `root`, in the order of their rows; columns: what they hold;
    length_column: the one that tells the length of a sentence at the least cost; mark_file: int32
    [marks], index of the file; mark_place: int64 [marks], byte of a record batch or number of a row
    group in it; mark_row: int64 [marks + 1], row that it begins with, the number of rows last.
    """

    root: str
    names: tuple[str, ...]
    columns: tuple[str, ...]
    length_column: str
    mark_file: np.ndarray
    mark_place: np.ndarray
    mark_row: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> TokenFiles:
        """Finds the files and marks them.

        Raises InputError: no data files, one that is missing, damaged or cut short, no column `input_ids`
        of integer lists, files that differ in their columns, no rows.
        """
        names = data_files(folder)
        schema: pa.Schema | None = None
        marks, row, trusted = [], 0, True
        for index, name in enumerate(names):
            try:
                with closing(_open(os.path.join(folder, name))) as file:
                    _check_columns(file.schema, schema, folder, name, names[0])
                    schema = schema or file.schema
                    for number, (place, rows) in enumerate(p for p in file.places() if p[1]):
                        if number % MARK_EVERY == 0:
                            marks.append((index, place, row))
                        row += rows
                    trusted = trusted and file.tells_length()
            except _DAMAGED as error:
                raise InputError(
                    f"census.uri {folder}: {name} is damaged or cut short: {error}. Copy or write it anew."
                ) from error
        if schema is None or not row:
            raise InputError(f"census.uri {folder}: its data files hold no cell")
        file_, place_, row_ = zip(*marks, strict=True)
        return cls(
            root=str(folder),
            names=tuple(names),
            columns=tuple(schema.names),
            length_column=LENGTH if trusted else TOKENS,
            mark_file=np.array(file_, np.int32),
            mark_place=np.array(place_, np.int64),
            mark_row=np.array([*row_, row], np.int64),
        )

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.mark_row[-1])

    def rows_of(self, file: int) -> tuple[int, int]:
        """The first row of a file, by its index, and the one after its last."""
        marks = np.flatnonzero(self.mark_file == file)
        return (int(self.mark_row[marks[0]]), int(self.mark_row[marks[-1] + 1])) if len(marks) else (0, 0)

    def batches(self, columns: Sequence[str], wanted: np.ndarray | None = None) -> Iterator[Chosen]:
        """The batches that hold a wanted row, in order.

        columns: of the batches; wanted: rows, int64, ascending (None: all). Raises OSError for a file that
        is damaged, or shorter than when it was opened.
        """
        if wanted is None:
            marks = np.arange(len(self.mark_file))
        else:
            marks = np.unique(np.searchsorted(self.mark_row, wanted, side="right") - 1)
        for index in np.unique(self.mark_file[marks]):
            path = os.path.join(self.root, self.names[index])
            try:
                with closing(_open(path)) as file:
                    for mark in marks[self.mark_file[marks] == index]:
                        first, stop = self.mark_row[mark : mark + 2]
                        if wanted is None:
                            rows = np.arange(stop - first)
                        else:
                            rows = wanted[slice(*np.searchsorted(wanted, [first, stop]))] - first
                        batches = file.read(int(self.mark_place[mark]), rows, columns)
                        for batch, chosen in _chosen(batches, rows):
                            batch = batch.select(list(columns))
                            batch.validate(full=True)  # else a wrong offset is an address of anything
                            yield Chosen(int(index), batch, chosen)
            except _DAMAGED as error:
                says = f"{path} cannot be read, or is not what it was when it was opened: {error}"
                raise OSError(says) from error

    def digests(self) -> dict[str, str]:
        """blake2b (16 bytes, hex) of each file by name. Reads all of them, as many at once as CPUs."""

        def digest(name: str) -> str:
            with open(os.path.join(self.root, name), "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
            return dict(zip(self.names, pool.map(digest, self.names), strict=True))


def lists_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of an array of lists, laid end to end, and where in them each begins and ends (int64).

    A list that is null is empty; a value that is null becomes `<mask>`, which no sentence may hold.
    """
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    offsets = column.offsets.to_numpy().astype(np.int64, copy=False)
    begin, end = offsets[:-1], offsets[1:]
    if column.null_count:
        end = np.where(column.is_valid().to_numpy(zero_copy_only=False), end, begin)
    values = column.values.fill_null(MASK) if column.values.null_count else column.values
    return values.to_numpy(), begin, end


def stands_at(folder: Path) -> bool:
    """Whether `datasets` wrote the folder, or Parquet files lie in it."""
    return any((folder / name).is_file() for name in (STATE, DICT)) or bool(_parquet_in(folder))


def data_files(folder: Path) -> list[str]:
    """The data files by their names relative to `folder`, splits in their order.

    Raises InputError where there are none, or one that is named is missing.
    """
    if (folder / DICT).is_file():
        splits = _json(folder / DICT).get("splits")
        if not isinstance(splits, list) or not splits:
            raise InputError(f"census.uri {folder}: {DICT} names no split. Write the DatasetDict anew")
        return [f"{split}/{name}" for split in splits for name in _saved(folder / str(split))]
    if (folder / STATE).is_file():
        return _saved(folder)
    if not (names := _parquet_in(folder)):
        raise InputError(
            f"census.uri {folder}: neither {STATE}, {DICT} nor a .parquet file stands there. Give the "
            "local folder that Dataset.save_to_disk wrote, or one with the Parquet files of a hub data set"
        )
    return names


def _saved(folder: Path) -> list[str]:
    """Files that the state of a saved `Dataset` names."""
    if not (folder / STATE).is_file():
        raise InputError(f"census.uri: {folder} has no {STATE}: copy the whole folder of save_to_disk")
    try:
        names = [str(entry["filename"]) for entry in _json(folder / STATE)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE} is not what Dataset.save_to_disk writes ({error!r})") from error
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"census.uri: {STATE} of {folder} names {name}, which is missing: copy it too")
    return names


def _parquet_in(folder: Path) -> list[str]:
    """Parquet files of the folder and those in it, hidden ones (a download's cache) aside, sorted."""
    names = (path.relative_to(folder) for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Copy or write it anew") from error
    return content if isinstance(content, dict) else {}


def _check_columns(schema: pa.Schema, first: pa.Schema | None, folder: Path, name: str, other: str) -> None:
    """Raises InputError unless `schema` has sentences and the columns of the first file."""
    if TOKENS not in schema.names:
        raise InputError(
            f"census.uri {folder}: {name} has no column {TOKENS}. It has: {', '.join(schema.names)}. "
            f"Token sentences are expected; for counts give a folder of .h5ad files"
        )
    kind = schema.field(TOKENS).type
    if not _is_list(kind) or not pa.types.is_integer(kind.value_type):
        raise InputError(f"census.uri {folder}: {TOKENS} of {name} is {kind}; lists of integers are expected")
    for field in schema:
        if pa.types.is_dictionary(field.type) and not name.endswith(".parquet"):
            raise InputError(
                f"census.uri {folder}: {name} has a dictionary column ({field.name}), which `datasets` does "
                "not write. Save the data with Dataset.save_to_disk, or as Parquet"
            )
    if first is None:
        return
    ours, theirs = ({field.name: field.type for field in each} for each in (schema, first))
    if differ := sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)):
        told = "; ".join(f"{n}: {ours.get(n, 'none')} and {theirs.get(n, 'none')}" for n in differ)
        raise InputError(
            f"census.uri {folder}: {name} and {other} have different columns ({told}). "
            "Give them the same columns, or prepare them as corpora of their own"
        )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _chosen(
    batches: Iterator[tuple[int, pa.RecordBatch]], wanted: np.ndarray
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Batches (with the row that each begins at) that hold a wanted row, and their wanted rows."""
    found = 0
    for start, batch in batches:
        rows = wanted[slice(*np.searchsorted(wanted, [start, start + len(batch)]))] - start
        if len(rows):
            found += len(rows)
            yield batch, rows
    if found < len(wanted):
        raise EOFError(f"{len(wanted) - found} rows are missing")


class _Stream:
    """An Arrow IPC stream, memory-mapped. A place is the byte that a record batch begins at."""

    def __init__(self, path: str) -> None:
        self._file = pa.memory_map(path)
        self.schema = ipc.open_stream(self._file).schema
        self._first = self._file.tell()

    def places(self) -> Iterator[tuple[int, int]]:
        """Place and rows of each batch. Raises EOFError for a stream without its end mark."""
        self._file.seek(self._first)
        place = self._first
        while (batch := self._next()) is not None:
            yield place, len(batch)
            place = self._file.tell()
        if self._file.tell() == place:
            raise EOFError("the stream does not come to its end")

    def read(
        self, place: int, wanted: np.ndarray, columns: Sequence[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches from a place on, as far as a row is wanted; all columns, since none costs anything."""
        self._file.seek(place)
        start = 0
        while start <= wanted[-1] and (batch := self._next()) is not None:
            yield start, batch
            start += len(batch)

    def tells_length(self) -> bool:
        """No: the offsets of the lists cost nothing and cannot be wrong."""
        return False

    def close(self) -> None:
        self._file.close()

    def _next(self) -> pa.RecordBatch | None:
        try:
            message = ipc.read_message(self._file)
        except EOFError:
            return None
        return ipc.read_record_batch(message, self.schema)


class _Parquet:
    """A Parquet file. A place is the number of a row group."""

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(path)
        self.schema = self._file.schema_arrow
        self._rows = [
            self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)
        ]

    def places(self) -> Iterator[tuple[int, int]]:
        """Place and rows of each row group."""
        yield from enumerate(self._rows)

    def read(
        self, place: int, wanted: np.ndarray, columns: Sequence[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of the row groups from a place on that hold a wanted row."""
        start = 0
        for group in range(place, len(self._rows)):
            stop = start + self._rows[group]
            if start > wanted[-1]:
                return
            if np.diff(np.searchsorted(wanted, [start, stop]))[0]:
                for batch in self._file.iter_batches(
                    PARQUET_ROWS, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield start, batch
                    start += len(batch)
            start = stop

    def tells_length(self) -> bool:
        """Whether a column `length` adds up to the tokens that the footer counts: reading it then spares
        the decoding of every sentence."""
        if LENGTH not in self.schema.names or not pa.types.is_integer(self.schema.field(LENGTH).type):
            return False
        metadata = self._file.metadata
        tokens = 0
        for group in range(len(self._rows)):
            chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
            tokens += sum(c.num_values for c in chunks if c.path_in_schema.split(".")[0] == TOKENS)
        length = self._file.read(columns=[LENGTH], use_threads=False)[LENGTH]
        return length.null_count == 0 and (pc.sum(length).as_py() or 0) == tokens

    def close(self) -> None:
        self._file.close()


def _open(path: str) -> _Stream | _Parquet:
    return _Parquet(path) if path.endswith(".parquet") else _Stream(path)
