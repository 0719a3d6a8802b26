"""A notice to stop, from who runs the job to rank 0: an actor that both hold a handle of.

Rank 0 waits in a thread for the answer of one call, so that the notice arrives at once and costs nothing
meanwhile; the step's own collective carries it to the other ranks, and all stop after the same step.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class _Notice:
    def __init__(self) -> None:
        self._given = asyncio.Event()

    async def give(self) -> None:
        self._given.set()

    async def wait(self) -> None:
        await self._given.wait()


def make_notice() -> Any:
    """An actor on this node, where the job's driver runs: it lives as long as the job does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Notice.options(scheduling_strategy=here, max_concurrency=100).remote()  # type: ignore[attr-defined]


class Listener:
    """Whether the notice was given (rank 0)."""

    def __init__(self, notice: Any) -> None:
        self._heard = threading.Event()
        threading.Thread(target=self._listen, args=(notice,), daemon=True).start()

    @property
    def heard(self) -> bool:
        return self._heard.is_set()

    def _listen(self, notice: Any) -> None:
        try:
            ray.get(notice.wait.remote())
        except RayError:
            return  # the driver is gone, and the workers with it
        self._heard.set()
