"""The plan: every cell once per epoch, whatever the lanes; micro-batches of near-equal load."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.corpus.plan import Plan, RowGroups
from langcell.errors import InputError


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    files = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=5))
    micro_batch, lanes = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return Plan(
        tuple(RowGroups(f"slice-{i}", tuple(rows)) for i, rows in enumerate(files)),
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
    rows = {
        (groups.file, index): rows for groups in plan.row_groups for index, rows in enumerate(groups.rows)
    }
    assert all(0 <= row < rows[file, index] for file, index, row in cells)


@settings(max_examples=80, deadline=None)
@given(plans())
def test_every_lane_has_every_step_of_the_epoch_once(plan: Plan) -> None:
    for lane in range(plan.lanes):
        windows = list(plan.windows(0, lane))
        steps = [w.first_step + s for w in windows for s in range(w.steps)]
        assert steps == [s for round in range(plan.rounds) for s in plan.steps_of(round)]
        assert steps == list(range(plan.steps))
        for window in windows:
            assert sum(span.stop - span.start for span in window.spans) == window.steps * plan.micro_batch


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 16), st.integers(0, 99))
def test_dealing_is_a_permutation_of_the_window(steps: int, micro_batch: int, seed: int) -> None:
    plan = Plan((RowGroups("a", (steps * micro_batch,)),), seed, micro_batch, micro_batch, steps)
    [window] = plan.windows(0, 0)
    lengths = np.random.default_rng(seed).integers(1, 2048, steps * micro_batch)
    dealt = plan.deal(window, lengths)
    assert dealt.shape == (steps, micro_batch)
    assert sorted(dealt.ravel()) == list(range(steps * micro_batch))


def test_micro_batches_have_near_equal_tokens() -> None:
    """Census-like lengths: the spread of loads is below one cell's, where random dealing has several."""
    plan = Plan((RowGroups("a", (512,)),), 0, 32, 32, 16)
    [window] = plan.windows(0, 0)
    lengths = np.random.default_rng(0).lognormal(6.8, 0.6, 512).astype(int).clip(1, 2048)
    loads = lengths[plan.deal(window, lengths)].sum(axis=1)
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(16, 32).sum(axis=1)
    assert np.ptp(loads) < lengths.max()
    assert np.ptp(loads) < np.ptp(shuffled) / 4


def test_epochs_and_seeds_differ_and_repeat() -> None:
    groups = (RowGroups("a", (8,) * 16),)
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
        Plan((RowGroups("a", (8,)),), 0, 10, 4, 1)


@settings(max_examples=80, deadline=None)
@given(plans(), st.integers(0, 3))
def test_a_round_alone_is_that_of_the_whole_epoch(plan: Plan, epoch: int) -> None:
    """What a task derives from two numbers, with a plan that was sent to it."""
    sent = pickle.loads(pickle.dumps(plan))
    lanes = range(plan.lanes)
    assert [sent.round(epoch, round, lanes) for round in range(sent.rounds)] == list(
        zip(*(plan.windows(epoch, lane) for lane in lanes), strict=True)
    )
    assert (sent.hash, sent) == (plan.hash, plan)


def test_the_order_is_the_same_for_ever() -> None:
    """A checkpoint of an older version goes on in the same order: it is not to change unseen."""
    plan = Plan((RowGroups("a", (5, 3)), RowGroups("b", (4, 4))), 1, 4, 2, 2, "corpus")
    assert [[(s.file, s.index, s.start, s.stop) for s in w.spans] for w in plan.windows(0, 1)] == [
        [("a", 0, 4, 5), ("a", 1, 0, 3)],
        [("b", 1, 0, 4)],
    ]
    assert plan.hash == "b2769420ec25487a87454e24bdfd2288"


class Counted(tuple):
    """Row groups that count how often one of them, or their number, is asked for."""

    visits = 0

    def __iter__(self) -> Iterator:
        for each in super().__iter__():
            Counted.visits += 1
            yield each

    def __len__(self) -> int:
        Counted.visits += 1
        return super().__len__()


def test_row_groups_are_gone_through_once_whatever_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "visits", 0)
    files = Counted(RowGroups(f"{i}", Counted([8] * 10)) for i in range(50))
    plan = Plan(files, seed=0, global_batch=8, micro_batch=4, window_steps=1)
    windows = [window for epoch in range(2) for lane in range(2) for window in plan.windows(epoch, lane)]
    assert len(windows) == 2 * 2 * plan.steps == 2000
    # Rows and numbers of row groups are taken once: in all a few times 550, not once a window.
    assert Counted.visits < 4 * 550


def test_what_follows_from_a_plan_does_not_travel() -> None:
    plan = Plan((RowGroups("a", (8,) * 100),), 0, 8, 4, 4)
    fresh = pickle.dumps(plan)
    assert list(plan.windows(0, 0))
    assert plan.hash
    assert pickle.dumps(plan) == fresh
