"""What counts must be before anything is made of them, and what is wrong with a cell whose are not.

Every pass asks the same question of the same counts, so a cell whose counts are none is in no sentence and
had no part in beta either. One sweep over the CSR, no copy. A cell's total is its count over *all* genes
measured (`raw_sum` of a Census), which may exceed the sum of its row: X may hold a part of the genes (the
demo's 765 hold 11-28%). A total below the row's sum can not be one.
"""

from __future__ import annotations

from enum import IntEnum

import numba as nb
import numpy as np
import scipy.sparse as sp


class Fault(IntEnum):
    """What is wrong with a cell; its name in lower case stands in summary.json and skipped.parquet."""

    NONE = 0
    NOT_FINITE = 1
    NEGATIVE = 2
    NOT_INTEGER = 3
    EMPTY = 4
    TOTAL = 5
    MISFIT = 6
    UNREADABLE = 7
    NO_GENE = 8
    NO_TOKEN = 9


NONE, NOT_FINITE, NEGATIVE, NOT_INTEGER, EMPTY, TOTAL, MISFIT = (int(fault) for fault in list(Fault)[:7])
REASONS = {
    Fault.NOT_FINITE: "a count is NaN or infinite",
    Fault.NEGATIVE: "a count is negative",
    Fault.NOT_INTEGER: "a count is no whole number: give raw counts, neither normalised nor log-transformed",
    Fault.EMPTY: "no gene has a count",
    Fault.TOTAL: "its total (raw_sum, over all genes measured) is not a positive number or is below the sum "
    "of its counts",
    Fault.MISFIT: "obs, var and X do not fit: X holds another number of its non-zeros than obs says, or a "
    "gene of it twice",
    Fault.UNREADABLE: "its slice cannot be read",
    Fault.NO_GENE: "none of its genes has both a token and a median",
    Fault.NO_TOKEN: "its sentence holds what is no token of the vocabulary",
}
"""What each fault means, in the words of a message."""


def find_faults(counts: sp.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """The first `Fault` of each cell among those that its counts alone show (uint8 [cells]).

    counts: float32 CSR [cells, genes], columns in ascending order within a row; totals: float64 [cells].
    """
    return _find(counts.data, counts.indices, counts.indptr, np.ascontiguousarray(totals, np.float64))


@nb.njit(cache=True, nogil=True)
def _find(data, indices, indptr, totals):  # type: ignore[no-untyped-def]
    fault = np.zeros(len(indptr) - 1, np.uint8)
    for cell in range(len(fault)):
        total = np.float64(0)
        worst = NONE
        for entry in range(indptr[cell], indptr[cell + 1]):
            x = np.float64(data[entry])
            if not np.isfinite(x):
                worst = NOT_FINITE
                break
            if x < 0:
                worst = NEGATIVE
            elif worst == NONE and x != np.floor(x):
                worst = NOT_INTEGER
            if worst == NONE and entry > indptr[cell] and indices[entry] == indices[entry - 1]:
                worst = MISFIT
            total += x
        if worst == NONE and total == 0:
            worst = EMPTY
        elif worst == NONE and not (np.isfinite(totals[cell]) and totals[cell] >= total):
            worst = TOTAL
        fault[cell] = worst
    return fault
