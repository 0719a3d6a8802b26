"""The counts of a slice out of .h5ad files: what travels into a task.

A file's columns are put on the union of genes by a table that the reader carries (4 bytes a column, once for
all files with the same columns), so a task reads no var. Entries go to their places piece by piece: beside
the 8 bytes of each promised entry a task holds some 40 MB (116 MB at the peak for 10.2M entries).
Measured on one core, entries a second: 52M as anndata writes by default, 21M of 28M that HDF5 inflates where
it is compressed (gzip); 11M where symbols lead to Ensembl ids, since rows must be sorted then.

A cell's total, where the file does not state it, is taken before columns without a gene are dropped, and
is NaN where any entry of the cell is no count: two symbols with half a count each would otherwise be summed
to a whole one, and a negative count of a dropped column would lower the total unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp

from langcell.census.h5ad_matrix import CountMatrix, Entries, opened
from langcell.census.slices import RawCells, Slice


@dataclass(frozen=True)
class StoredFile:
    """A file that the reader knows. start: joinid of its first cell; shape: cells and genes; layout: index
    into `H5adReader.layouts`; states_totals: whether its obs has raw_sum."""

    path: str
    matrix: str
    start: int
    shape: tuple[int, int]
    layout: int
    states_totals: bool


@dataclass(frozen=True, eq=False)
class H5adReader:
    """Reads slices of a folder of .h5ad files; keeps `langcell.census.slices.Reader`.

    files: ascending by `start`; layouts: column of the union for each column of a file, -1 for one that is
    left out (int32); n_vars: genes of the union.
    """

    files: tuple[StoredFile, ...]
    layouts: tuple[np.ndarray, ...]
    n_vars: int

    def __call__(self, part: Slice) -> RawCells:
        """The cells of `part.cells`, each as the file has it now: `fits` is false where that is not what it
        had when it was opened. Raises OSError for a file that is gone or damaged."""
        joinid, promised = (part.cells[name].to_numpy() for name in ("soma_joinid", "nnz"))
        room = int(promised.sum())
        cells = _Cells(joinid, promised, part.cells["raw_sum"].to_numpy(), self.n_vars, room)
        starts = np.array([file.start for file in self.files])
        of_file = np.searchsorted(starts, joinid, side="right") - 1
        edges = np.concatenate([[0], np.flatnonzero(np.diff(of_file)) + 1, [len(joinid)]])
        for first, last in pairwise(edges):
            stored = self.files[of_file[first]]
            layout = self.layouts[stored.layout]
            with opened(stored.path) as file:
                matrix = CountMatrix.of(file, stored.matrix, stored.shape)
                for piece in matrix.read(joinid[first:last] - stored.start, promised[first:last]):
                    cells.add(first, piece, layout, stored.states_totals)
        return cells.finish()


class _Cells:
    """RawCells in the making: every entry is put where it belongs as it arrives."""

    def __init__(
        self, joinid: np.ndarray, promised: np.ndarray, raw_sum: np.ndarray, n_vars: int, room: int
    ) -> None:
        self._promised, self._n_vars = promised, n_vars
        self._totals = raw_sum.astype(np.float64)
        self._fits = np.ones(len(joinid), bool)
        self._count, self._gene = np.empty(room, np.float32), np.empty(room, np.int32)
        self._indptr = np.zeros(len(joinid) + 1, np.int32)
        self._end = 0

    def add(self, first: int, piece: Entries, layout: np.ndarray, states_totals: bool) -> None:
        """Entries of the cells from `first + piece.first` on."""
        n = piece.last - piece.first
        where = slice(first + piece.first, first + piece.last)
        row, column, count = piece.row, piece.column, piece.count

        fits = np.bincount(row, minlength=n) == self._promised[where]
        inside = (column >= 0) & (column < len(layout))
        fits[row[~inside]] = False
        valid = fits[row]
        if not valid.all():
            row, column, count = row[valid], column[valid], count[valid]

        totals = self._totals[where] if states_totals else np.bincount(row, count, minlength=n).astype(float)
        no_count = ~((count >= 0) & (count == np.rint(count)) & np.isfinite(count))
        totals[row[no_count]] = np.nan
        totals[~fits] = np.nan
        self._totals[where], self._fits[where] = totals, fits

        gene = layout[column]
        kept = gene >= 0
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=n))])
        rows = sp.csr_matrix((count[kept].astype(np.float32), gene[kept], offsets), (n, self._n_vars))
        rows.sum_duplicates()  # two symbols of one gene; sorts, too
        rows.eliminate_zeros()  # stored zeros are no counts
        end = self._end + rows.nnz
        self._count[self._end : end], self._gene[self._end : end] = rows.data, rows.indices
        self._indptr[where.start + 1 : where.stop + 1] = self._end + rows.indptr[1:]
        self._end = end

    def finish(self) -> RawCells:
        """All cells, after the last piece."""
        shape = (len(self._fits), self._n_vars)
        counts = sp.csr_matrix((self._count[: self._end], self._gene[: self._end], self._indptr), shape)
        counts.has_canonical_format = True
        return RawCells(counts, self._totals, self._fits)
