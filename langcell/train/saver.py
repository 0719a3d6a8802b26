"""Saving in the background: what stops training is the copy to the CPU, not the storage.

`save` assembles the state (`checkpoint.capture`) and hands it to a thread; every rank's thread writes its two
files and tells rank 0 on the board (keys in the process group's own store, so that no thread takes part in a
collective), where it also puts its part of the trace; rank 0's thread writes that, commits when all have
told, and removes what need not be kept. One checkpoint is under way at a time: while any rank is busy the
next one is put off, never waited for, or the slowest storage would set the step time.

A checkpoint that cannot be written costs nothing but itself: training goes on and the next one is tried.
Where the third in a row fails the run ends, with the storage's own words.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from langcell.train.checkpoint import Pieces, capture, describe, updates
from langcell.train.store import Cursor, File, Record, Shard, Store, name_of
from langcell.train.trace import Trace, encode
from langcell.train.trace import write as write_trace

MOST_FAILED = 3
POLL_S = 0.05


class TakenOverError(RuntimeError):
    """Another job goes on with this run: this one must not write to it any more."""


@dataclass(frozen=True)
class Keep:
    """What is kept: the `last` newest, the best by validation loss, and those of epoch ends if told."""

    last: int
    epoch_ends: bool


class Saver:
    """Saves one stage's checkpoints; one on every rank.

    board: a c10d store that all ranks see, used by this object's thread alone; start: global step that the
    run goes on from; before_commit: what rank 0 does before a checkpoint exists (it may raise, and then it
    does not).
    """

    def __init__(
        self,
        store: Store,
        board: dist.Store,
        trace: Trace,
        keep: Keep,
        start: int,
        before_commit: Callable[[], None],
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.failures: list[str] = []
        """Why the last checkpoints were not committed (rank 0); empty after one that was."""
        self.taken_over: str | None = None
        self.committed: str | None = None
        """The last checkpoint that was (rank 0)."""
        self._store, self._board, self._trace, self._keep = store, board, trace, keep
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._tries = 0
        self._traced_to, self._seen = start, list[bytes]()  # of all ranks, since the last commit (rank 0)

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def hopeless(self) -> bool:
        """Whether saving was tried in vain often enough (rank 0)."""
        return len(self.failures) >= MOST_FAILED

    def save(
        self, engine: DeepSpeedEngine, cursor: Cursor, val_loss: float | None, *, ends_epoch: bool
    ) -> None:
        """Begin a checkpoint. A collective, at a time when no rank is busy."""
        assert not self.busy
        pieces = capture(engine)
        tau = float(engine.module.temperature(engine.device).detach())
        record = Record(cursor, updates(engine), tau, val_loss, ends_epoch)
        self._tries += 1
        work = (pieces, self._trace.take(), record, self._tries)
        self._thread = threading.Thread(target=self._write, args=work, daemon=True)
        self._thread.start()

    def wait(self, device: torch.device) -> bool:
        """Wait until no rank is busy; whether the last checkpoint was committed. A collective, and a lively
        one: nobody sits in it longer than a poll."""
        while True:
            lost = bool(self.failures) or self.taken_over is not None
            state = torch.tensor([float(self.busy), float(lost)], device=device)
            dist.all_reduce(state)
            busy, lost = state.tolist()
            if not busy:
                return not lost
            time.sleep(POLL_S)

    def save_now(self, device: torch.device, *args: Any, **kwargs: Any) -> bool:
        """`save` and `wait`, tried again where it fails; whether it was committed. A collective."""
        self.wait(device)
        for attempt in range(MOST_FAILED):
            if attempt:
                time.sleep(2.0**attempt)
            self.save(*args, **kwargs)
            if self.wait(device):
                return True
        return False

    def _write(self, pieces: Pieces, seen: list[pa.Table], record: Record, attempt: int) -> None:
        name = name_of(record.cursor.global_step)
        key = f"checkpoint/{name}/{attempt}"
        self._board.set(f"{key}/{self.rank}/trace", encode(seen))  # type: ignore[arg-type]  # bytes are taken
        try:
            files: dict[str, File] = {}
            for kind, data in pieces.serialised():
                file = f"{kind}-{self.rank:05d}-of-{self.ranks:05d}.safetensors"
                files[kind] = self._store.write(name, file, data)
            told = describe(Shard(pieces.shapes, files["weights"], files["optimizer"]))
        except Exception as error:  # whatever storage says must reach rank 0, which waits for a word
            told = json.dumps({"error": f"rank {self.rank}: {type(error).__name__}: {error}"})
        self._board.set(f"{key}/{self.rank}/files", told)
        if self.rank == 0:
            self._finish(name, record, key)

    def _finish(self, name: str, record: Record, key: str) -> None:
        try:
            self._commit(name, record, key)
        except TakenOverError as error:
            self.taken_over = str(error)
            return
        except Exception as error:
            self.failures = [*self.failures, str(error)]
            print(
                f"checkpoint {name} was not committed ({error}); training goes on, and what was committed "
                f"before stands{f' ({self.committed})' if self.committed else ''}",
                flush=True,
            )
            with contextlib.suppress(OSError):
                self._store.remove(name)  # half of it may fill a disk that is full
            return
        self.failures, self.committed = [], name
        try:
            self._store.retain(self._keep.last, self._keep.epoch_ends)
        except OSError as error:
            print(f"an old checkpoint was not removed: {error}", flush=True)

    def _commit(self, name: str, record: Record, key: str) -> None:
        told = [json.loads(data) for data in self._collect(key, "files")]
        self._seen += self._collect(key, "trace")
        if errors := [part["error"] for part in told if "error" in part]:
            raise OSError("; ".join(errors))
        shards = [Shard(part["shapes"], File(**part["weights"]), File(**part["optimizer"])) for part in told]
        self._before_commit()
        stop = record.cursor.global_step
        write_trace(self._store.root, record.cursor.stage, self._traced_to, stop, self._seen)
        self._store.commit(name, replace(record, shards=shards))
        self._traced_to, self._seen = stop, []

    def _collect(self, key: str, what: str) -> list[bytes]:
        """What every rank put on the board, which is cleared of it."""
        keys = [f"{key}/{rank}/{what}" for rank in range(self.ranks)]
        while not self._board.check(keys):
            time.sleep(POLL_S)
        found = [self._board.get(one) for one in keys]
        for one in keys:
            self._board.delete_key(one)
        return found
