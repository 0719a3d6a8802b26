"""Slices: contiguous ranges of joinids, the unit that is read, recomputed and counted once.

A slice is sized by non-zeros, not by cells, so that the memory of the task that reads it is bounded and
known beforehand; what it holds is a pure function of (release, filter, slice). This module is the contract
that every source of cells keeps: a `Source` says what there is, its `Reader` travels into a task and gives
the counts of one slice. A Census, a folder of .h5ad files and the embedded cells differ behind it alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from langcell.errors import InputError

BAND = 2048
"""Rows of a data tile of X/raw (Census schema 2.4.0)."""


@dataclass(frozen=True)
class Slice:
    """One read task: the joinids [start, stop) and the cells wanted among them.

    cells: soma_joinid (int64, ascending), raw_sum (float64), nnz (int64) and whatever columns came
    with them; nnz: their non-zeros.
    """

    index: int
    start: int
    stop: int
    cells: pa.Table
    nnz: int

    def __reduce__(self) -> tuple[Any, ...]:
        # On the driver the cells of all slices are views of one table; what travels is the slice's own.
        own = self.cells.take(np.arange(len(self.cells)))
        return Slice, (self.index, self.start, self.stop, own, self.nnz)


@dataclass(frozen=True)
class RawCells:
    """What a source holds of the cells of a slice, in their order.

    counts: float32 CSR [cells, genes of var], columns in ascending order within a row; totals: float64
    [cells], counts over all genes measured; fits: bool [cells], false where the store gave another number
    of non-zeros than it promises (the row's counts then mean nothing).
    """

    counts: sp.csr_matrix
    totals: np.ndarray
    fits: np.ndarray


class Reader(Protocol):
    """Reads the counts of a slice. Travels by pickle into other processes and opens its own handles."""

    def __call__(self, part: Slice) -> RawCells:
        """The cells of `part.cells`. Raises OSError or SOMAError for storage that does not answer or is
        damaged."""
        ...


@dataclass(frozen=True)
class Sentences:
    """Sentences of genes that a source holds of the cells of a slice, end to end in their order.

    offsets: int64 [cells + 1]; tokens: uint16, `<cls>` first in each sentence; fits: bool [cells], false
    (and the sentence empty) where one holds what no gene's token is: another vocabulary made it.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    fits: np.ndarray


class SentenceReader(Protocol):
    """Reads the sentences of a slice, as a `Reader` reads counts."""

    def __call__(self, part: Slice) -> Sentences: ...


class Source(Protocol):
    """Cells that the options select."""

    @property
    def release(self) -> dict[str, Any]:
        """What the cells come from, for a manifest, JSON values; it pins their content."""
        ...

    @property
    def reader(self) -> Reader: ...

    @property
    def remarks(self) -> dict[str, dict[str, Any]]:
        """What was left out of it or not understood, for a report: `genes_without_id` and
        `genes_duplicated` (columns by file), `labels_unmapped` (cells by facet and label)."""
        ...

    def obs(self, columns: Iterable[str]) -> pa.Table:
        """The selected cells in joinid order.

        soma_joinid (int64), raw_sum (float64, total count over all genes; NaN where only the counts
        tell), nnz (int64, most non-zeros), then `columns`; text as dictionary<int32, string>. Raises
        InputError for a column that obs does not have.
        """
        ...

    def var(self) -> pa.Table:
        """The genes: soma_joinid (int64: 0, 1, 2, ...), feature_id and feature_name (string). Row i is
        the gene of column i of every slice."""
        ...

    def datasets(self, soma_joinid: np.ndarray) -> list[str]:
        """The dataset of each cell, by joinid (int64, ascending), to name it in a message."""
        ...

    def close(self) -> None:
        """Closes the handles."""
        ...


def make_slices(cells: pa.Table, max_nnz: int) -> list[Slice]:
    """Cuts cells (soma_joinid ascending, raw_sum, nnz, ...) into slices of near-equal non-zeros.

    As few slices as `max_nnz` allows, then the smallest largest one; a slice exceeds `max_nnz` only
    if it is a single cell. Cuts fall on the edges of bands, and between any two cells of a band
    that alone exceeds `max_nnz`. Depends on nothing but its arguments.
    """
    if not 0 < max_nnz < 2**31:
        raise InputError(f"census.slice_nnz is {max_nnz}; it must lie between 1 and 2,147,483,647")
    joinid = cells["soma_joinid"].to_numpy()
    if (np.diff(joinid) <= 0).any():
        raise ValueError("cells must be in ascending order of soma_joinid, each once")
    if not len(joinid):
        return []
    total = np.concatenate([[0], np.cumsum(cells["nnz"].to_numpy())])

    # Where a cut may fall: cell counts, ascending, first 0 and last all.
    edges = np.concatenate([[0], np.flatnonzero(np.diff(joinid // BAND)) + 1, [len(joinid)]])
    heavy = np.flatnonzero(np.diff(total[edges]) > max_nnz)
    inner = [np.arange(edges[i] + 1, edges[i + 1]) for i in heavy]
    edges = np.unique(np.concatenate([edges, *inner]))
    at_edge = total[edges]

    def cut(bound: int) -> list[int]:
        """Edges at which slices of at most `bound` non-zeros, filled from the left, begin and end."""
        marks = [0]
        while marks[-1] < len(edges) - 1:
            fits = int(np.searchsorted(at_edge, at_edge[marks[-1]] + bound, side="right")) - 1
            marks.append(max(fits, marks[-1] + 1))
        return marks

    fewest = len(cut(max_nnz))
    low, high = 0, max_nnz  # the least bound that still needs no more slices
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= fewest else (middle + 1, high)
    marks = edges[cut(low)]
    return [
        Slice(
            index,
            int(joinid[first]),
            int(joinid[last - 1]) + 1,
            cells.slice(first, last - first),
            int(total[last] - total[first]),
        )
        for index, (first, last) in enumerate(pairwise(marks))
    ]
