"""What is no count is found, in whatever cell it stands and whatever stands beside it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.cells.faults import REASONS, Fault, find_faults

NUMBERS = [0, 1, 2, 5, 2**24, -1, -2.5, 0.5, 1.5, np.nan, np.inf, -np.inf]


def expected(row: list[float], total: float) -> Fault:
    """The same by definition, one cell at a time."""
    if not all(np.isfinite(x) for x in row):
        return Fault.NOT_FINITE
    if any(x < 0 for x in row):
        return Fault.NEGATIVE
    if any(x != int(x) for x in row):
        return Fault.NOT_INTEGER
    if not any(row):
        return Fault.EMPTY
    return Fault.NONE if np.isfinite(total) and total >= sum(row) else Fault.TOTAL


@given(
    rows=st.lists(st.lists(st.sampled_from(NUMBERS), min_size=3, max_size=3), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_every_cell_gets_its_own_fault(rows: list[list[float]], data: st.DataObject) -> None:
    total = st.sampled_from([0.0, -4.0, 1.0, 3.0, 7.0, 2.0**27, np.nan, np.inf])
    totals = [data.draw(total) for _ in rows]
    counts = sp.csr_matrix(np.array(rows, np.float32))
    got = find_faults(counts, np.array(totals))
    assert got.dtype == np.uint8
    assert got.tolist() == [expected(row, total) for row, total in zip(rows, totals, strict=True)]


@pytest.mark.parametrize("total", [0.0, -4.0, 3.0, np.nan, np.inf])
def test_a_total_that_cannot_be_one(total: float) -> None:
    counts = sp.csr_matrix(np.array([[1, 1], [1, 3]], np.float32))
    assert find_faults(counts, np.array([900.0, total])).tolist() == [Fault.NONE, Fault.TOTAL]


def test_stored_zeros_make_no_cell() -> None:
    counts = sp.csr_matrix(np.array([[2.0, 1.0]], np.float32))
    counts.data[:] = 0
    assert find_faults(counts, np.array([9.0])).tolist() == [Fault.EMPTY]


def test_a_gene_twice_in_a_row_is_no_row() -> None:
    counts = sp.csr_matrix((np.ones(5, np.float32), [0, 2, 2, 1, 2], [0, 3, 5]), (2, 3))
    assert find_faults(counts, np.array([9.0, 9.0])).tolist() == [Fault.MISFIT, Fault.NONE]


def test_every_fault_has_words() -> None:
    assert set(REASONS) == set(Fault) - {Fault.NONE}
