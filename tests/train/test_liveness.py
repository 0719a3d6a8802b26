"""A rank that holds the others up is named, with what it does and where."""

from __future__ import annotations

import time

import pytest

from langcell.bench.ranks import run_ranks
from langcell.train.liveness import DATA, STEP, VALIDATION, Beat, said

NOW = 1000.0


def beat(step: int, phase: str, ago: float = 100.0) -> Beat:
    return Beat(step, phase, NOW - ago, "10.0.0.7")


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        (
            [beat(8, STEP), beat(7, STEP, 130), beat(8, STEP)],
            ["rank 1 is behind: step of step 7, on 10.0.0.7, since 130 s", "ranks 0, 2 wait"],
        ),
        ([beat(8, STEP), beat(8, STEP), beat(8, DATA)], ["rank 2 is behind: waiting for data of step 8"]),
        (
            [beat(8, DATA), beat(8, STEP), beat(8, DATA)],
            ["rank 0 is behind", "rank 2 is behind", "ranks 1 wait"],
        ),
        (
            [beat(8, STEP, 90), beat(8, STEP, 95)],
            ["all ranks are in the same place; rank 1 came there first"],
        ),
        ([beat(8, VALIDATION), None], ["rank 1 never said where it was"]),
    ],
)
def test_who_is_behind(beats: list[Beat | None], words: list[str]) -> None:
    message = said(dict(enumerate(beats)), 60, NOW)
    assert message.startswith("no progress for 60 s (train.collective_timeout_s)")
    for word in words:
        assert word in message


def test_a_rank_without_a_pulse_is_named_first() -> None:
    """Where it stands says nothing: it stopped in the very step that the others are at."""
    beats: dict[int, Beat | None] = {0: beat(8, STEP), 1: beat(8, STEP), 2: beat(7, STEP)}
    message = said(beats, 60, NOW, frozenset({1}))
    assert "rank 1 gives no sign of life: step of step 8, on 10.0.0.7" in message
    assert "behind" not in message


def waiting(rank: int) -> str | None:
    """Rank 1 gets no data for five seconds; rank 0 waits for it."""
    from langcell.train.liveness import Liveness, board

    with Liveness(board(), 1.0, f"host-{rank}") as liveness:
        liveness.at(4, DATA)
        if rank == 0:
            liveness.at(4, STEP)
        time.sleep(5.0)
        return liveness.message


def busy(rank: int) -> str | None:
    """Both take two seconds and a half, of which they tell."""
    from langcell.train.liveness import EVALUATION, Liveness, board

    with Liveness(board(), 1.0, "host") as liveness:
        for step in range(5):
            liveness.at(step, STEP)
            time.sleep(0.3)
        liveness.at(5, EVALUATION)  # as long as it takes
        time.sleep(2.0)
        return liveness.message


def test_each_rank_says_whom_it_waits_for() -> None:
    for message in run_ranks(waiting, 2):
        assert message is not None
        assert "rank 1 is behind: waiting for data of step 4, on host-1" in message
        assert "ranks 0 wait for it" in message


def test_progress_is_no_hang() -> None:
    assert run_ranks(busy, 2) == [None, None]
