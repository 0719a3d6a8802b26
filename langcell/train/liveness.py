"""Who holds the others up: every rank says where it is, and one that waits too long says whom it waits for.

A rank that is stopped, cut off or starved of data hangs all others in a collective, whose time-out names an
address at best. So each rank writes step and phase to the board (a key in the process group's own store,
0.1 ms) whenever they change, and a thread of its own looks whether that was too long ago. Then it reads what
the others wrote, says which of them is behind and in what, and ends its process if the collective does not
end by itself (NCCL's does not, gloo's does): Ray Train starts the group again from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

CHECK_S = 0.5
COLLECTIVE_S, GRACE_S = 5.0, 10.0
"""Seconds after the limit when a collective raises by itself (the process group's time-out), and when a
process whose collective does not is ended."""
PULSE_S, ANSWER_S = 2.0, 4.0
"""Seconds in which a pulse must have gone on, and in which rank 0 must have answered."""
EXIT_CODE = 70
START, DATA, STEP, VALIDATION, EVALUATION, CHECKPOINT = (
    "start",
    "waiting for data",
    "step",
    "validation",
    "evaluation",
    "checkpoint",
)


def board() -> dist.Store:
    """The store by which the process group was made: it lives as long as rank 0 does."""
    return dist.distributed_c10d._get_default_store()


def clone(board: dist.Store) -> dist.Store:
    """The same store by a connection of its own: one is not for two threads."""
    return board.clone()  # type: ignore[attr-defined]  # missing in the stubs


@dataclass(frozen=True)
class Beat:
    """Where a rank is: the global step, the phase, and since when (seconds since the epoch, its own
    clock)."""

    step: int
    phase: str
    since: float
    host: str

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}, on {self.host}"


def said(
    beats: dict[int, Beat | None], limit_s: float, now: float, still: frozenset[int] = frozenset()
) -> str:
    """A message that names who is behind. beats: of every rank (None: it said nothing); still: ranks whose
    pulse does not go on, stopped or cut off."""
    silent = [rank for rank, beat in beats.items() if beat is None]
    told = {rank: beat for rank, beat in beats.items() if beat is not None}
    if not told:
        return f"no progress for {limit_s:.0f} s (train.collective_timeout_s): no rank said where it was"
    least = min((beat.step, beat.phase != DATA) for beat in told.values())
    behind = {rank: beat for rank, beat in told.items() if (beat.step, beat.phase != DATA) == least}
    if still & told.keys():
        lines = [f"rank {rank} gives no sign of life: {told[rank]}" for rank in sorted(still & told.keys())]
    elif len(behind) == len(beats):
        oldest = min(behind, key=lambda rank: behind[rank].since)
        lines = [f"all ranks are in the same place; rank {oldest} came there first ({behind[oldest]})"]
    else:
        lines = [
            f"rank {rank} is behind: {beat}, since {now - beat.since:.0f} s" for rank, beat in behind.items()
        ]
        ahead = sorted(told.keys() - behind.keys())
        lines.append(f"ranks {', '.join(map(str, ahead))} wait for it")
    lines += [f"rank {rank} never said where it was" for rank in silent]
    return f"no progress for {limit_s:.0f} s (train.collective_timeout_s): " + "; ".join(lines)


class Liveness:
    """One rank's word to the others, and its watch over its own progress; a context around the loop.

    board: a c10d store that all ranks see; limit_s: how long one phase of one step may take (s).
    """

    def __init__(self, board: dist.Store, limit_s: float, host: str) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.message: str | None = None
        """What was said when it took too long."""
        self._own, self._watching, self._beating = clone(board), clone(board), clone(board)
        self._limit_s, self._host = limit_s, host
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._beat)]

    def __enter__(self) -> Liveness:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S)

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase of a step. An evaluation may take as long as it takes: there all do the
        same."""
        self._since = math.inf if phase == EVALUATION else time.monotonic()
        self._own.set(f"beat/{self.rank}", f"{step}\n{phase}\n{time.time()}\n{self._host}")

    def again(self) -> None:
        """A long phase goes on: what it does in parts may take so long each."""
        if self._since != math.inf:
            self._since = time.monotonic()

    def _beat(self) -> None:
        """A pulse that goes on whatever the training thread waits for."""
        count = 0
        with contextlib.suppress(RuntimeError, OSError):  # the store is gone, and rank 0 with it
            while not self._stop.wait(CHECK_S):
                count += 1
                self._beating.set(f"pulse/{self.rank}", str(count))

    def _watch(self) -> None:
        while not self._stop.wait(CHECK_S):
            since = self._since
            if time.monotonic() - since <= self._limit_s:
                continue
            self.message = self._ask()
            print(f"rank {self.rank}: {self.message}", file=sys.stderr, flush=True)
            if self._stop.wait(GRACE_S):
                return
            if self._since == since:
                os._exit(EXIT_CODE)
            self.message = None  # slow, and no hang

    def _ask(self) -> str:
        """Who is behind. Rank 0 may be: its store then answers nobody, not even with an error."""
        found: list[tuple[dict[int, Beat | None], frozenset[int]]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                before = self._pulses()
                time.sleep(PULSE_S)
                after = self._pulses()
                still = {r for r in range(self.ranks) if before[r] == after[r]} - {self.rank}
                found.append((self._beats(), frozenset(still)))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        if found:
            beats, still = found[0]
            return said(beats, self._limit_s, time.time(), still)
        return (
            f"no progress for {self._limit_s:.0f} s (train.collective_timeout_s): rank 0 is behind or cut "
            f"off: it keeps the others' word, and does not answer in {ANSWER_S:.0f} s"
        )

    def _pulses(self) -> list[bytes]:
        keys = [f"pulse/{rank}" for rank in range(self.ranks)]
        return [self._watching.get(key) if self._watching.check([key]) else b"" for key in keys]

    def _beats(self) -> dict[int, Beat | None]:
        beats: dict[int, Beat | None] = {}
        for rank in range(self.ranks):
            key = f"beat/{rank}"
            beats[rank] = None
            if self._watching.check([key]):
                step, phase, since, host = self._watching.get(key).decode().split("\n")
                beats[rank] = Beat(int(step), phase, float(since), host)
        return beats
