"""Counts per ten thousand, and the refusal of what are no counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from langcell.cells.normalize import check_counts, normalize
from langcell.errors import InputError


def csr(rows: list[list[float]]) -> sp.csr_matrix:
    return sp.csr_matrix(np.array(rows, np.float32))


def test_values_are_parts_of_the_total_not_of_the_row() -> None:
    counts = csr([[1, 0, 3], [0, 0, 0], [0, 7, 0]])
    got = normalize(counts, np.array([8.0, 5.0, 70.0]))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, [1 / 8 * 1e4, 3 / 8 * 1e4, 7 / 70 * 1e4])


def test_counts_are_taken_with_a_total_above_the_row() -> None:
    check_counts(csr([[1, 0, 3], [0, 2, 0]]), np.array([4.0, 900.0]))
    check_counts(csr([[0, 0], [0, 1]]), np.array([3.0, 1.0]))


@pytest.mark.parametrize(
    ("entry", "says"),
    [(-1.0, "-1.0"), (1.5, "1.5"), (np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")],
)
def test_what_is_no_count_is_refused(entry: float, says: str) -> None:
    with pytest.raises(InputError, match=f"row 2 has {says} in column 1 .1 such"):
        check_counts(csr([[1, 0], [0, 0], [2, entry]]), np.array([9.0, 9.0, 9.0]))


@pytest.mark.parametrize("total", [0.0, -4.0, 3.0, np.nan, np.inf])
def test_a_total_that_cannot_be_one_is_refused(total: float) -> None:
    with pytest.raises(InputError, match=r"Row 1 has a total of .* add up to 4 \(1 such"):
        check_counts(csr([[1, 1], [1, 3]]), np.array([2.0, total]))


def test_a_total_of_zero_is_refused_even_for_an_empty_row() -> None:
    with pytest.raises(InputError, match="Row 0"):
        check_counts(csr([[0, 0]]), np.array([0.0]))
