"""The counts of an .h5ad file: where they lie, what is checked of them, and how some rows are read.

Rows stored by rows (CSR, or dense) can be read one by one: `indptr` says where a row begins, so a task
reads the rows of its slice and nothing else, in pieces of at most `_PIECE` entries and one row. A matrix
stored by columns (CSC) would have to be read whole for any row, and is refused with the remedy. What has to
be right of the whole file (shape, indptr) is checked when it is opened; what only the entries can tell
(a column that is not there) when its row is read.

Wanted rows that lie near each other are read together: one call of HDF5 costs as much as some ten thousand
entries, so a gap of less is read over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import h5py
import numpy as np

from langcell.errors import InputError

_PIECE = 1 << 20
_GAP = 1 << 15
_LOOK = 10_000
"""Entries looked at when a file is opened."""


@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """The open file. Raises OSError, naming the file, for whatever HDF5 finds wrong until it is closed."""
    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        reason = str(error.args[-1]) if error.args else type(error).__name__
        raise OSError(f"{path} cannot be read as .h5ad: {reason}") from error


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of some rows, in their order.

    first, last: which of the rows asked for; row: int64 [n], counted from `first`; column and count: [n],
    of the file's own number types.
    """

    first: int
    last: int
    row: np.ndarray
    column: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class CountMatrix:
    """Counts of an open file, cells x genes. node: group of a CSR matrix, or a dense dataset."""

    node: h5py.Group | h5py.Dataset
    shape: tuple[int, int]

    @classmethod
    def of(cls, file: h5py.File, key: str, shape: tuple[int, int]) -> CountMatrix:
        """The matrix at `key`, of the expected shape. Raises InputError where there is none that fits."""
        path = file.filename
        if key not in file:
            raise InputError(
                f"{path} has no matrix {key}. It has: {', '.join(_matrices(file)) or 'none'}; name the one "
                "that holds raw counts under matrix in census.obs_map"
            )
        node = file[key]
        form = "dense"
        if isinstance(node, h5py.Group):
            form = str(node.attrs.get("encoding-type", "no matrix"))
        if form == "csc_matrix":
            raise InputError(
                f"{path}: {key} is stored by columns (CSC), which would have to be read whole for every "
                "slice. Store it by rows with anndata: a.X = a.X.tocsr(); a.write_h5ad(...)"
            )
        if form not in ("dense", "csr_matrix"):
            raise InputError(f"{path}: {key} is stored as {form}; CSR or a dense array is expected")
        arrays = [node] if form == "dense" else [node.get(name) for name in ("indptr", "indices", "data")]
        if not all(isinstance(part, h5py.Dataset) and part.dtype.kind in "biuf" for part in arrays):
            raise InputError(f"{path}: {key} is damaged: it does not consist of arrays of numbers")
        found = node.shape if form == "dense" else node.attrs.get("shape")
        if found is None or tuple(np.ravel(found)) != shape:
            raise InputError(
                f"{path}: {key} has the shape {found}, but obs has {shape[0]} cells and var {shape[1]} genes"
            )
        return cls(node, shape)

    @property
    def dense(self) -> bool:
        return isinstance(self.node, h5py.Dataset)

    def row_nnz(self) -> np.ndarray:
        """Stored entries of every row (int64), of a dense matrix its non-zeros (which reads it once).

        Raises InputError where indptr does not fit the entries: the file is damaged or was cut.
        """
        if self.dense:
            rows = max(1, _PIECE // max(self.shape[1], 1))
            parts = [
                np.count_nonzero(self.node[start : start + rows], axis=1)
                for start in range(0, self.shape[0], rows)
            ]
            return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
        indptr = self.node["indptr"][:].astype(np.int64)
        length = np.diff(indptr)
        stored = {self.node[name].shape for name in ("indices", "data")}
        if len(length) != self.shape[0] or indptr[0] != 0 or (length < 0).any() or stored != {(indptr[-1],)}:
            raise InputError(
                f"{self.node.file.filename}: {self.node.name[1:]} is damaged: its indptr does not fit its "
                f"{len(self.node['data'])} entries"
            )
        return length

    def check_raw(self) -> None:
        """Raises InputError if most of the first entries are no whole numbers: these are not raw counts.

        Single bad cells are left to the check of every cell.
        """
        if self.dense:
            rows = max(1, _LOOK // max(self.shape[1], 1))
            look = self.node[:rows]
            look = look[look != 0]
        else:
            look = self.node["data"][:_LOOK]
        if 2 * np.count_nonzero(look != np.rint(look)) > len(look):
            file, key = self.node.file, self.node.name[1:]
            others = [name for name in _matrices(file) if name != key]
            advice = "give a file with raw counts"
            if others:
                first = "raw/X" if "raw/X" in others else others[0]
                advice = f"if {first} holds them, say `matrix: {first}` in census.obs_map"
                advice += f" (matrices there: {', '.join(others)})"
            raise InputError(
                f"{file.filename}: {key} holds no raw counts ({look[look != np.rint(look)][0]:g}, ...) but "
                f"normalised values; {advice}"
            )

    def read(self, rows: np.ndarray, promised: np.ndarray) -> Iterator[Entries]:
        """Entries of `rows` (int64, ascending), in pieces; of a row that has not as many as promised, none.

        A row of a dense matrix is given whatever it has.
        """
        begin, end = self._bounds(rows)
        if not self.dense:
            whole = (end - begin == promised) & (begin >= 0) & (end <= len(self.node["data"]))
            end = np.maximum.accumulate(np.where(whole, end, 0))
            begin = np.where(whole, begin, end)
        apart = begin[1:] - end[:-1] > _GAP
        read_over = np.where(apart, 0, begin[1:] - end[:-1])
        piece = (np.cumsum(end - begin) + np.concatenate([[0], np.cumsum(read_over)])) // _PIECE
        for first, last in pairwise(_edges(np.diff(piece) != 0)):
            runs = list(pairwise(_edges(apart[first : last - 1]) + first))
            if self.dense:
                blocks = [self.node[rows[i] : rows[j - 1] + 1][rows[i:j] - rows[i]] for i, j in runs]
                block = np.concatenate(blocks)
                row, column = block.nonzero()
                yield Entries(first, last, row, column, block[row, column])
                continue
            column, count = (
                np.concatenate([self.node[name][begin[i] : end[j - 1]] for i, j in runs])
                for name in ("indices", "data")
            )
            length = (end - begin)[first:last]
            row = np.repeat(np.arange(last - first), length)
            if len(row) < len(column):
                # Where a row begins in what was read, less where it begins in what is kept.
                over = np.concatenate([[0], read_over[first : last - 1]])
                place = np.arange(len(row)) + np.repeat(np.cumsum(over), length)
                column, count = column[place], count[place]
            yield Entries(first, last, row, column, count)

    def _bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each row begins and ends among the entries (int64)."""
        if self.dense:
            return rows * self.shape[1], (rows + 1) * self.shape[1]
        indptr = self.node["indptr"][rows[0] : rows[-1] + 2].astype(np.int64)
        return indptr[rows - rows[0]], indptr[rows - rows[0] + 1]


def _edges(new: np.ndarray) -> np.ndarray:
    """Where the parts of a sequence begin and the last one ends; new: whether item i + 1 begins a part."""
    return np.concatenate([[0], np.flatnonzero(new) + 1, [len(new) + 1]])


def _matrices(file: h5py.File) -> list[str]:
    layers = [f"layers/{name}" for name in file.get("layers", ())]
    return [key for key in ("X", "raw/X", *layers) if key in file]
