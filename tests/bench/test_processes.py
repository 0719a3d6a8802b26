"""Figures of a process are its own: time, memory, CPUs; what fails there fails here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest

from langcell.bench.processes import Family, Work, afresh, alone, together, watched


def spin(seconds: float) -> Work:
    """Uses a CPU for so long."""

    def work() -> int:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return os.getpid()

    return work


def watch_spin() -> Work:
    """Uses a CPU for 0.3 s under watch; what was seen."""

    def work() -> Family:
        with watched() as family:
            spin(0.3)()
        return family

    return work


def hold(megabytes: int) -> Work:
    return lambda: float(np.ones(megabytes * 125_000).sum())


def cpus(_: int) -> Work:
    return lambda: sorted(os.sched_getaffinity(0))


def fail(which: str, error: str) -> Work:
    def work() -> None:
        raise ValueError(f"work {error}")

    if which == "ready":
        raise KeyError(f"ready {error}")
    return work


def fail_second(number: int) -> Callable[[], None]:
    if number:
        raise KeyError("second")
    return lambda: None


def test_time_and_memory_are_those_of_the_work() -> None:
    small, large = alone(spin, 0.3, repeats=3), alone(hold, 400)
    assert len(small.values) == len(small.walls_s) == 3
    assert len(set(small.values)) == 1
    assert small.values[0] != os.getpid()
    assert 0.3 <= small.cpu_s < 0.4
    assert small.wall_s >= 0.29
    assert large.peak_mb > 400
    assert large.peak_mb - small.peak_mb > 350


def test_afresh_is_another_process_each_time() -> None:
    done = afresh(spin, 0.1, repeats=2)
    assert len(set(done.values)) == len(done.values) == len(done.walls_s) == 2
    assert 0.1 <= done.cpu_s < 0.2


def test_several_work_at_the_same_time() -> None:
    both = together(spin, [(0.2,), (0.3,)], repeats=2, cpus=len(os.sched_getaffinity(0)))
    assert len(both.cpus_s) == 2
    assert 0.5 <= both.cpu_s < 0.7
    assert both.wall_s >= 0.29


def test_work_is_bound_to_its_cpus() -> None:
    there = sorted(os.sched_getaffinity(0))
    assert alone(cpus, 0).values[0] == there[:1]
    assert alone(cpus, 0, cpus=len(there)).values[0] == there
    assert sorted(os.sched_getaffinity(0)) == there


@pytest.mark.parametrize(("which", "error"), [("ready", KeyError), ("work", ValueError)])
def test_what_fails_there_fails_here(which: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{which} broken"):
        alone(fail, which, "broken")


def test_one_that_fails_does_not_keep_the_others_waiting() -> None:
    with pytest.raises(KeyError, match="second"):
        together(fail_second, [(0,), (1,)], repeats=1, cpus=1)


def test_a_watch_counts_its_process() -> None:
    [family] = alone(watch_spin).values  # this process may have a Ray of other tests among its children
    assert 0.25 <= family.cpu_s < 0.6
    assert family.workers == 0
