"""Words from who runs the job to rank 0, by an actor that both hold a handle of: stop, and save.

Rank 0 waits in a thread for the answer, so that a word arrives at once, and asks anew every few seconds, so
that who gives it knows whether there is a rank 0 to hear: while workers wait for nodes there is none. The
step's own collective carries the word to the other ranks, and all do the same after the same step.

stop: from the driver, which was told to end. save: from Ray Train's controller, which takes all workers down
to start more of them: what they did since the last checkpoint, up to 15 minutes, would be lost each time
that a spot node comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Word = Literal["stop", "save"]
ASK_S = 5.0
"""How long rank 0 waits for one answer; a third of what it may be silent (s)."""
SAVE_S = 120.0
"""How long Ray Train's controller waits for a checkpoint (s): it does nothing else meanwhile."""


@ray.remote(num_cpus=0)
class _Notice:
    def __init__(self) -> None:
        self._words = set[Word]()
        self._given, self._saved = asyncio.Event(), asyncio.Event()
        self._asked = -math.inf

    async def stop(self) -> bool:
        self._give("stop")
        return self._listens

    async def listens(self) -> bool:
        return self._listens

    async def save(self) -> bool:
        self._saved.clear()
        self._give("save")
        while self._listens and not self._saved.is_set():
            await _wait(self._saved, 1.0)
        self._words.discard("save")
        return self._saved.is_set()

    async def saved(self) -> None:
        self._words.discard("save")
        self._saved.set()

    async def wait(self) -> set[Word]:
        self._asked = time.monotonic()
        await _wait(self._given, ASK_S)
        self._given.clear()
        return self._words

    async def closed(self) -> None:
        self._asked = -math.inf
        self._given.set()  # lets the last question go

    @property
    def _listens(self) -> bool:
        return time.monotonic() - self._asked < 3 * ASK_S

    def _give(self, word: Word) -> None:
        self._words.add(word)
        self._given.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def stop(notice: Any) -> bool:
    """Tell rank 0 to stop; whether there is one that hears it."""
    try:
        return bool(ray.get(notice.stop.remote(), timeout=3 * ASK_S))
    except RayError:
        return False


def make_notice() -> Any:
    """An actor on this node, where the job's driver runs: it lives as long as the job does.

    Its `save` tells whether a checkpoint was committed.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Notice.options(scheduling_strategy=here, max_concurrency=100).remote()  # type: ignore[attr-defined]


class SaveBeforeResize(ControllerCallback):  # type: ignore[misc]
    """Has workers that run commit a checkpoint before they are replaced by more of them (in Ray Train's
    controller; how it says so is no public interface of Ray 2.60's)."""

    def __init__(self, notice: Any) -> None:
        self._notice = notice

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            with contextlib.suppress(RayError):  # then they go on from an older one
                ray.get(self._notice.save.remote(), timeout=SAVE_S)


class Listener:
    """What rank 0 was told."""

    def __init__(self, notice: Any) -> None:
        self._notice, self._words, self._closed = notice, set[Word](), False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def heard(self) -> set[Word]:
        return set(self._words)

    def saved(self) -> None:
        """Answer that a checkpoint was committed."""
        self._words.discard("save")
        self._notice.saved.remote()  # who does not hear it goes on without

    def close(self) -> None:
        """Say that nobody listens any more."""
        self._closed = True
        self._notice.closed.remote()

    def _listen(self) -> None:
        while not self._closed:
            try:
                self._words |= ray.get(self._notice.wait.remote())
            except ActorUnavailableError:
                time.sleep(1.0)  # the network; it comes back
            except RayError:
                return  # the driver is gone, and the workers with it
