"""Other numbers of workers in the middle of an epoch: the same cells, texts and draws, and losses to 1e-5."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from langcell.errors import Interrupted
from langcell.recipes.stopping import Stopping
from langcell.recipes.training import Trained, fit
from tests.faults.making import Straight, Tiny, last_step, watched

T = TypeVar("T")


class StopAt(Stopping):
    """Gives the notice at a step, as a signal would."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__()
        self.run_dir, self.step = run_dir, step

    def attend(self, work: Callable[[], T], notify: Callable[[], bool]) -> T:
        def give(done: threading.Event) -> None:
            while not done.wait(0.01):
                if last_step(self.run_dir) >= self.step:
                    notify()
                    return

        with watched(give):
            return super().attend(work, notify)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 8), (1, 30), (3, None)],
        pytest.param([(2, 8), (1, 30), (2, 50), (3, None)], marks=pytest.mark.soak),
    ],
    ids=["twice", "thrice"],
)
def test_workers_come_and_go(
    straight: Straight, tiny: Tiny, tmp_path: Path, sizes: list[tuple[int, int | None]]
) -> None:
    """Of four lanes: fewer workers in stage 1, more in stage 2. sizes: workers, and the step they stop at."""
    run_dir = tmp_path / "run"
    trained: Trained | None = None
    for workers, stop in sizes:
        first, second = tiny.tasks(run_dir, num_workers=workers)
        stopping = Stopping() if stop is None else StopAt(run_dir, stop)
        try:
            trained = fit(replace(second, init=fit(first, stopping).name), stopping)
        except Interrupted:
            assert stop is not None
            continue
        assert stop is None, "it went past the notice"
    assert trained is not None
    tiny.assert_once(run_dir)
    assert tiny.seen(run_dir).equals(tiny.seen(straight.run_dir)), "other texts, or other draws"
    for ours, theirs in zip(tiny.losses(run_dir), tiny.losses(straight.run_dir), strict=True):
        *losses, norm = ours
        *expected, expected_norm = theirs
        assert losses == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    replayed = [recovery["steps_replayed"] for recovery in tiny.recoveries(run_dir)]
    assert replayed == [0] * (len(sizes) - 1), "a notice loses nothing"
