"""Being told to stop: SIGTERM (a preempted node, `ray job stop`) and ctrl-C.

While workers train they are given the notice, commit a checkpoint after the step they are at, and end; at any
other time, also where workers wait for nodes, the job ends where it is, for whatever is finished is kept.
Both end with exit code 75: the same command with `--run.resume auto` goes on. A second signal ends the job at
once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from langcell.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """What a signal does now. `install` it in the main thread; elsewhere signals do what they did."""

    def __init__(self) -> None:
        self._notify: Callable[[], bool] | None = None
        self._told = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def attend(self, work: Callable[[], T], notify: Callable[[], bool]) -> T:
        """Run `work` in a thread of its own; at the first signal call `notify`, and go on waiting where
        somebody heard it."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self._notify = notify
        try:
            return done.result()
        finally:
            self._notify = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._notify is None or self._told:
            raise Interrupted(f"ended by {name}")
        self._told = True
        if not self._notify():
            raise Interrupted(f"ended by {name}; no worker trains just now, what was committed stands")
        print(
            f"{name}: a checkpoint is made after this step, then the job ends; again: it ends at once",
            flush=True,
        )
