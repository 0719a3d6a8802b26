"""Processes that are made ready once and then work by turns, each with a peak of memory that is its own.

A step's process takes 15 s until it is ready (libraries, weights, engine), as long as a step itself, and a
measurement is fair if what is compared takes turns. Those that will take turns are made ready side by side;
while one works the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any

from langcell.bench.processes import memory_mb


class Kept:
    """A process on so many CPUs in which `ready(*args)` was called; what that returned is its work.

    ready: a function of a module (it travels by name). Whatever it or the work raises is raised by a turn.
    """

    def __init__(self, ready: Callable[..., Callable[..., Any]], *args: Any, cpus: int) -> None:
        own = sorted(os.sched_getaffinity(0))[:cpus]
        # Bound before any library counts the CPUs.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, own))
        self._ready = self._pool.submit(_make_ready, ready, args)

    def wait(self) -> None:
        """Until it is ready."""
        self._ready.result()

    def turn(self, *args: Any) -> tuple[Any, float]:
        """What the work returns for these arguments, and the largest memory by now (10^6 bytes)."""
        self.wait()
        return self._pool.submit(_turn, args).result()

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


_work: Any = None


def _make_ready(ready: Callable[..., Callable[..., Any]], args: tuple[Any, ...]) -> None:
    global _work
    _work = ready(*args)


def _turn(args: tuple[Any, ...]) -> tuple[Any, float]:
    return _work(*args), memory_mb(os.getpid())["VmHWM"]
