"""Counts per ten thousand, and what counts must be before anything is made of them.

A cell's total is its count over *all* genes measured (`raw_sum` of a Census), which may exceed the sum
of its row: X may hold a part of the genes (the demo's 765 hold 11-28%). A total below the row's sum can
not be one.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from langcell.errors import InputError

SCALE = 1e4
"""What a cell's counts are scaled to add up to (counts)."""


def normalize(counts: sp.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """`counts / total * 10,000`, in this order, for each stored entry in CSR order (float64 [nnz]).

    counts: CSR [cells, genes]; totals: float64 [cells] (LangCell, eq. 1; Geneformer's tokenizer).
    """
    total_of_entry = np.repeat(np.asarray(totals, np.float64), np.diff(counts.indptr))
    value = counts.data.astype(np.float64)
    value /= total_of_entry
    value *= SCALE
    return value


def check_counts(counts: sp.csr_matrix, totals: np.ndarray) -> None:
    """Raises InputError unless `counts` are raw counts and `totals` can be the totals of the cells.

    Refused, with the first cell at fault: an entry that is negative, no integer or not finite; a total
    that is not positive and finite, or below the sum of its row.
    """
    bad = ~((counts.data >= 0) & (counts.data == np.rint(counts.data)) & np.isfinite(counts.data))
    if bad.any():
        entry = int(np.argmax(bad))
        cell = int(np.searchsorted(counts.indptr, entry, side="right")) - 1
        raise InputError(
            f"Counts must be whole numbers, 0 or more; row {cell} has {counts.data[entry]} in column "
            f"{counts.indices[entry]} ({int(bad.sum())} such entries). Give raw counts, neither normalised "
            "nor log-transformed."
        )
    sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    wrong = ~((totals > 0) & (totals >= sums) & np.isfinite(totals))
    if wrong.any():
        cell = int(np.argmax(wrong))
        raise InputError(
            f"Row {cell} has a total of {totals[cell]} and counts that add up to {sums[cell]:g} "
            f"({int(wrong.sum())} such rows). The total of a cell (raw_sum) is its count over all genes "
            "measured: positive, and at least the sum of its row."
        )
