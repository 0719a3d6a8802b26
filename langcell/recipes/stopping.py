"""Being told to stop: SIGTERM (a preempted node, `ray job stop`) and ctrl-C.

While workers pretrain they are given the notice, commit a checkpoint after the step they are at, and end; at
any other time, also where workers wait for nodes or fine-tune, the job ends where it is, for whatever is
finished is kept. Both end with exit code 75: the same command goes on, of pretraining with
`--run.resume auto`. A second signal ends the job at once.

Ray Train's own handler would end a job of ctrl-C with exit code 0, as if it were done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from langcell.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 5.0
"""Between looks whether somebody still hears the notice (s)."""


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
        """Run `work` in a thread of its own; at the first signal call `notify`, and go on waiting while there
        is somebody who heard it.

        Raises Interrupted where nobody does.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._notify = notify
        threading.Thread(target=run, daemon=True).start()
        try:
            while not wait([done], timeout=LOOK_S).done:
                if self._told and not notify():
                    raise Interrupted("no worker trains any more, what was committed stands")
            return done.result()
        finally:
            self._notify = None

    def check(self) -> None:
        """Raises Interrupted where a signal has come: work may have ended before the notice reached it, and
        what follows must not begin."""
        if self._told:
            raise Interrupted("told to stop, what is finished is kept")

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._notify is None or self._told:
            raise Interrupted(f"ended by {name}")
        self._told = True
        if not self._notify():
            raise Interrupted(f"ended by {name}, what was committed stands")
        print(
            f"{name}: a checkpoint is made after this step, then the job ends; again: it ends at once",
            flush=True,
        )
