"""Counts per ten thousand."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from langcell.cells.normalize import normalize


def test_values_are_parts_of_the_total_not_of_the_row() -> None:
    counts = sp.csr_matrix(np.array([[1, 0, 3], [0, 0, 0], [0, 7, 0]], np.float32))
    got = normalize(counts, np.array([8.0, 5.0, 70.0]))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, [1 / 8 * 1e4, 3 / 8 * 1e4, 7 / 70 * 1e4])
