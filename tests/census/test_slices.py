"""Slices partition the cells and are bounded, near equal and small to ship."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.census.slices import BAND, make_slices
from langcell.errors import InputError


def cells_of(joinid: np.ndarray, nnz: np.ndarray) -> pa.Table:
    return pa.table({"soma_joinid": joinid, "raw_sum": nnz.astype(np.float64), "nnz": nnz})


@st.composite
def cell_tables(draw: st.DrawFn) -> pa.Table:
    gaps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 700, 5_000]), max_size=60))
    joinid = np.cumsum(np.array(gaps, np.int64))
    nnz = draw(st.lists(st.integers(0, 40), min_size=len(gaps), max_size=len(gaps)))
    return cells_of(joinid, np.array(nnz, np.int64))


@given(cells=cell_tables(), max_nnz=st.integers(1, 400))
@settings(max_examples=300, deadline=None)
def test_slices_partition_the_cells(cells: pa.Table, max_nnz: int) -> None:
    slices = make_slices(cells, max_nnz)
    assert [s.index for s in slices] == list(range(len(slices)))
    if len(cells):
        assert pa.concat_tables([s.cells for s in slices]).equals(cells)
    else:
        assert slices == []
    stop = 0
    for s in slices:
        joinid = s.cells["soma_joinid"].to_numpy()
        assert stop <= s.start == joinid[0]
        assert joinid[-1] == s.stop - 1
        stop = s.stop
        assert s.nnz == sum(s.cells["nnz"].to_pylist())
        assert s.nnz <= max_nnz or len(s.cells) == 1
    for a, b in pairwise(slices):
        band_a, band_b = (a.stop - 1) // BAND, b.start // BAND
        whole = cells.filter(
            pa.array(cells["soma_joinid"].to_numpy() // BAND == band_a)
        )  # a band is cut only if it is too large for one slice
        assert band_a != band_b or sum(whole["nnz"].to_pylist()) > max_nnz
        assert a.nnz + b.nnz > max_nnz  # no two could be one


def test_slices_are_near_equal() -> None:
    nnz = np.full(10 * BAND, 7, np.int64)
    slices = make_slices(cells_of(np.arange(10 * BAND), nnz), max_nnz=4 * BAND * 7)
    assert [len(s.cells) // BAND for s in slices] == [4, 4, 2]
    slices = make_slices(cells_of(np.arange(10), np.full(10, 7, np.int64)), max_nnz=35)
    assert [s.nnz for s in slices] == [35, 35]
    slices = make_slices(cells_of(np.arange(9), np.full(9, 7, np.int64)), max_nnz=56)
    assert max(s.nnz for s in slices) == 35  # two slices of 5 and 4, not of 8 and 1


def test_a_slice_ships_its_own_cells_only() -> None:
    n = 200_000
    slices = make_slices(cells_of(np.arange(n), np.ones(n, np.int64)), max_nnz=2_048)
    assert len(pickle.dumps(slices[0])) < 100_000


@pytest.mark.parametrize("joinid", [[2, 1], [1, 1]])
def test_unordered_cells_are_refused(joinid: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        make_slices(cells_of(np.array(joinid), np.ones(2, np.int64)), 5)


def test_bound_must_be_positive() -> None:
    with pytest.raises(InputError, match=r"census\.slice_nnz"):
        make_slices(cells_of(np.arange(3), np.ones(3, np.int64)), 0)
