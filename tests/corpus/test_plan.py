"""The plan: every cell once per epoch, whatever the lanes; micro-batches of near-equal load."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.corpus.plan import Plan, RowGroup
from langcell.errors import InputError


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    micro_batch, lanes = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return Plan(
        tuple(RowGroup(f"slice-{i // 2}", i % 2, n) for i, n in enumerate(rows)),
        seed=draw(st.integers(0, 5)),
        global_batch=micro_batch * lanes,
        micro_batch=micro_batch,
        window_steps=draw(st.integers(1, 6)),
    )


def _cells(plan: Plan, epoch: int) -> list[tuple[str, int, int]]:
    return [
        (span.file, span.index, row)
        for lane in range(plan.lanes)
        for window in plan.windows(epoch, lane)
        for span in window.spans
        for row in range(span.start, span.stop)
    ]


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 3))
def test_an_epoch_reads_every_cell_once_but_the_dropped_tail(plan: Plan, epoch: int) -> None:
    cells = _cells(plan, epoch)
    assert len(set(cells)) == len(cells) == plan.cells - plan.dropped
    rows = {(group.file, group.index): group.rows for group in plan.row_groups}
    assert all(0 <= row < rows[file, index] for file, index, row in cells)


@settings(max_examples=80, deadline=None)
@given(plans())
def test_every_lane_has_every_step_of_the_epoch_once(plan: Plan) -> None:
    for lane in range(plan.lanes):
        windows = list(plan.windows(0, lane))
        steps = [w.first_step + s for w in windows for s in range(w.steps)]
        assert steps == list(range(plan.steps))
        for window in windows:
            assert sum(span.stop - span.start for span in window.spans) == window.steps * plan.micro_batch


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 16), st.integers(0, 99))
def test_dealing_is_a_permutation_of_the_window(steps: int, micro_batch: int, seed: int) -> None:
    plan = Plan((RowGroup("a", 0, steps * micro_batch),), seed, micro_batch, micro_batch, steps)
    [window] = plan.windows(0, 0)
    lengths = np.random.default_rng(seed).integers(1, 2048, steps * micro_batch)
    dealt = plan.deal(window, lengths)
    assert dealt.shape == (steps, micro_batch)
    assert sorted(dealt.ravel()) == list(range(steps * micro_batch))


def test_micro_batches_have_near_equal_tokens() -> None:
    """Census-like lengths: the spread of loads is below one cell's, where random dealing has several."""
    plan = Plan((RowGroup("a", 0, 512),), 0, 32, 32, 16)
    [window] = plan.windows(0, 0)
    lengths = np.random.default_rng(0).lognormal(6.8, 0.6, 512).astype(int).clip(1, 2048)
    loads = lengths[plan.deal(window, lengths)].sum(axis=1)
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(16, 32).sum(axis=1)
    assert np.ptp(loads) < lengths.max()
    assert np.ptp(loads) < np.ptp(shuffled) / 4


def test_epochs_and_seeds_differ_and_repeat() -> None:
    groups = tuple(RowGroup("a", i, 8) for i in range(16))
    plan = Plan(groups, 0, 8, 4, 4)
    order = [_cells(plan, epoch) for epoch in (0, 1)]
    assert order[0] != order[1]
    assert _cells(Plan(groups, 0, 8, 4, 4), 0) == order[0]
    assert _cells(Plan(groups, 1, 8, 4, 4), 0) != order[0]
    assert Plan(groups, 1, 8, 4, 4).hash != plan.hash
    [first, *_] = plan.windows(0, 0)
    [again, *_] = plan.windows(1, 0)
    assert (plan.deal(first, np.ones(16, int)) != plan.deal(again, np.ones(16, int))).any()


def test_a_ragged_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no multiple"):
        Plan((RowGroup("a", 0, 8),), 0, 10, 4, 1)
