"""Measuring work in processes of its own: wall time, CPU time, and a peak of memory that is its own.

A peak (VmHWM) never falls and imports stay, so a measurement in a process that did something before would
report that. Work is started afresh (spawn, not fork), bound to as many CPUs as it may use, made ready
(opened, loaded, compiled), and then timed, several times in a row; several processes wait for each other
before each time.

Ray's workers are measured from outside, five times a second: `VmHWM` holds their peak of resident memory,
pages of the object store that they touched included; `RssAnon`, sampled, is what is theirs alone.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import psutil

MB = 1e6
INTERVAL_S = 0.2


@dataclass(frozen=True)
class Run:
    """What several repetitions of a piece of work took.

    walls_s: seconds of each repetition, from the first start to the last end; cpus_s: CPU seconds of each,
    of all processes; peak_mb: largest resident memory of a process (10^6 bytes); values: what the first
    process returned each time.
    """

    walls_s: list[float]
    cpus_s: list[float]
    peak_mb: float
    values: list[Any]

    @property
    def wall_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.walls_s)

    @property
    def cpu_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.cpus_s)


Work = Callable[[], Any]
"""Work that is ready: nothing is left to open, load or compile. May run several times."""


def alone(ready: Callable[..., Work], *args: Any, repeats: int = 1, cpus: int = 1) -> Run:
    """Measure `ready(*args)()` in a process of its own on so many CPUs; `ready` itself is not measured."""
    return together(ready, [args], repeats, cpus)


def afresh(ready: Callable[..., Work], *args: Any, repeats: int) -> Run:
    """As `alone`, each repetition in another process.

    For work that a process does once: memory that it touches for the first time can cost more than what is
    done with it (a dense matrix of 6,144 cells: 2.5 times the CPU time), and a second time is free of that.
    """
    runs = [alone(ready, *args) for _ in range(repeats)]
    return Run(
        walls_s=[wall for run in runs for wall in run.walls_s],
        cpus_s=[cpu for run in runs for cpu in run.cpus_s],
        peak_mb=max(run.peak_mb for run in runs),
        values=[value for run in runs for value in run.values],
    )


def together(ready: Callable[..., Work], args: list[tuple[Any, ...]], repeats: int, cpus: int) -> Run:
    """Measure a process for each of `args`, all working at the same time, on so many CPUs in all.

    ready: a function of a module (it travels by name). Whatever it or the work raises is raised here.
    """
    spawn = get_context("spawn")
    barrier = spawn.Barrier(len(args))
    own = sorted(os.sched_getaffinity(0))[:cpus]
    with ProcessPoolExecutor(len(args), spawn, _begin, (barrier, own)) as pool:
        tasks = [pool.submit(_measure, ready, each, repeats) for each in args]
        errors = [error for task in tasks if (error := task.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):  # those only waited for the culprit
                raise error
        done = [task.result() for task in tasks]
    rounds = list(zip(*(times for _, times, _ in done), strict=True))
    return Run(
        walls_s=[max(end for _, end, _ in r) - min(start for start, _, _ in r) for r in rounds],
        cpus_s=[sum(cpu for _, _, cpu in r) for r in rounds],
        peak_mb=max(peak for _, _, peak in done),
        values=done[0][0],
    )


_barrier: Any = None


def _begin(barrier: Any, cpus: list[int]) -> None:
    global _barrier
    _barrier = barrier
    os.sched_setaffinity(0, cpus)  # before any library counts them; children inherit it


def _measure(
    ready: Callable[..., Work], args: tuple[Any, ...], repeats: int
) -> tuple[list[Any], list[tuple[float, float, float]], float]:
    """The values, (start, end, CPU seconds) of each time, and the peak (MB)."""
    try:
        work = ready(*args)
        values, times = [], []
        for _ in range(repeats):
            _barrier.wait()
            start, cpu = time.monotonic(), time.process_time()
            values.append(work())
            times.append((start, time.monotonic(), time.process_time() - cpu))
    except BaseException:
        _barrier.abort()
        raise
    return values, times, memory_mb(os.getpid())["VmHWM"]


def memory_mb(pid: int) -> dict[str, float]:
    """`VmHWM` and `RssAnon` of a process, in 10^6 bytes. Raises OSError if it is gone."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: int(fields[name].split()[0]) * 1024 / MB for name in ("VmHWM", "RssAnon") if name in fields}


@dataclass
class Family:
    """What the processes below this one took, and this one itself.

    cpu_s: CPU seconds in all; worker_cpu_s: of Ray's workers; workers: how many ran; worker_peak_mb:
    largest resident memory of one; worker_private_mb: largest memory of one that no other shares.
    """

    cpu_s: float = 0.0
    worker_cpu_s: float = 0.0
    workers: int = 0
    worker_peak_mb: float = 0.0
    worker_private_mb: float = 0.0


@dataclass
class _Seen:
    worker: bool = False
    first_s: float = 0.0
    last_s: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Family]:
    """Watch this process and all below it while the block runs; the figures are there when it ended."""
    family, seen, stop = Family(), dict[int, _Seen](), threading.Event()
    own = psutil.Process()
    _look(own, seen)
    for known in seen.values():
        known.first_s = known.last_s

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            _look(own, seen)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield family
    finally:
        stop.set()
        watcher.join()
        _look(own, seen)
    workers = [each for each in seen.values() if each.worker and each.last_s > each.first_s]
    family.cpu_s = sum(each.last_s - each.first_s for each in seen.values())
    family.worker_cpu_s = sum(each.last_s - each.first_s for each in workers)
    family.workers = len(workers)
    family.worker_peak_mb = max((each.memory["VmHWM"] for each in workers), default=0.0)
    family.worker_private_mb = max((each.memory["RssAnon"] for each in workers), default=0.0)


def _look(own: psutil.Process, seen: dict[int, _Seen]) -> None:
    """Note what each process has used by now; one that is gone keeps what was noted last."""
    for process in [own, *own.children(recursive=True)]:
        try:
            times, memory = process.cpu_times(), memory_mb(process.pid)
            known = seen.setdefault(process.pid, _Seen())
            known.worker |= process.name().startswith("ray::")
        except (psutil.Error, OSError):
            continue
        known.last_s = times.user + times.system
        for name, value in memory.items():
            known.memory[name] = max(known.memory.get(name, 0.0), value)
