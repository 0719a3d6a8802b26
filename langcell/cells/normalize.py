"""Counts per ten thousand of a cell's total."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

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
