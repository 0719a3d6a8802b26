"""Saving in the background: what stops training is the copy to the CPU, not the storage.

`save` assembles the state (`checkpoint.capture`) and hands it to a thread; every rank's thread writes its two
files and its part of the trace and tells rank 0 on the board (a key in the process group's own store, so that
no thread takes part in a collective); rank 0's thread joins the parts of the trace, commits when all have
told, and removes what need not be kept. One checkpoint is under way at a time: while any rank is busy the
next one is put off, never waited for, or the slowest storage would set the step time.

A checkpoint that cannot be written costs nothing but itself: training goes on and the next one is tried.
Where the third in a row fails the run ends, with the storage's own words. Files carry a token of the workers
that wrote them, and the run's owner is asked right before the record is written: workers that were given up,
and live on behind a cut cable, neither overwrite nor remove what their successors wrote.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from langcell.train.checkpoint import Pieces, capture, updates
from langcell.train.store import Cursor, File, Record, Shard, Store, name_of
from langcell.train.trace import Trace, cut_back, encode
from langcell.train.trace import write as write_trace

MOST_FAILED = 3
POLL_S = 0.05
KINDS = {"trace": "parquet", "weights": "safetensors", "optimizer": "safetensors"}
"""The files of a rank."""


class TakenOverError(RuntimeError):
    """Another job goes on with this run: this one must not write to it any more."""


@dataclass(frozen=True)
class Keep:
    """What is kept: the `last` newest, the best by validation loss, and those of epoch ends if told."""

    last: int
    epoch_ends: bool


class Saver:
    """Saves one stage's checkpoints; one on every rank.

    board: a c10d store that all ranks see, used by this object's thread alone; token: of these workers;
    start: global step that the run goes on from; before_commit: what rank 0 does before a checkpoint exists
    (it may raise, and then it does not), after_commit: and once it does; alive: called while others are
    waited for.
    """

    def __init__(
        self,
        store: Store,
        board: dist.Store,
        trace: Trace,
        keep: Keep,
        *,
        token: str,
        start: int,
        before_commit: Callable[[], None],
        alive: Callable[[], None],
        after_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.failures: list[str] = []
        """Why the last checkpoints were not committed (rank 0); empty after one that was."""
        self.taken_over: str | None = None
        self.committed: str | None = None
        """The last checkpoint that was (rank 0)."""
        self._store, self._board, self._trace, self._keep = store, board, trace, keep
        self._suffix = f"{self.rank:05d}-of-{self.ranks:05d}-{token[:8]}"
        self._before_commit, self._after_commit, self._alive = before_commit, after_commit, alive
        self._thread: threading.Thread | None = None
        self._name, self._tries = "", 0
        self._unwritten: list[pa.Table] = []  # of this rank's trace, where its file could not be written
        self._traced_to, self._parts = start, list[bytes]()  # of all ranks, since the last commit (rank 0)

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
        self._name, self._tries = name_of(cursor.global_step), self._tries + 1
        work = (pieces, self._trace.take(), record, f"checkpoint/{self._tries}")
        self._thread = threading.Thread(target=self._write, args=work, daemon=True)
        self._thread.start()

    def wait(self, device: torch.device) -> bool:
        """Wait until no rank is busy; whether the last checkpoint was committed. A collective, and a lively
        one: nobody sits in it longer than a poll."""
        while True:
            self._alive()
            busy = self.busy  # before the rest, which the thread sets
            whole = self.rank != 0 or self.committed == self._name
            state = torch.tensor([float(busy), float(not whole)], device=device)
            dist.all_reduce(state)
            any_busy, lost = state.tolist()
            if not any_busy:
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

    def _write(self, pieces: Pieces, seen: list[pa.Table], record: Record, key: str) -> None:
        """In the thread: this rank's files, a word on the board, and (rank 0) the rest."""
        files: dict[str, File] = {}
        told: dict[str, Any]
        seen = [*self._unwritten, *seen]
        try:
            files["trace"] = self._put(f"trace-{self._suffix}.parquet", encode(seen))
            self._unwritten = []
            for kind, data in pieces.serialised():
                files[kind] = self._put(f"{kind}-{self._suffix}.safetensors", data)
            told = {"shard": asdict(Shard(pieces.shapes, files["weights"], files["optimizer"]))}
        except Exception as error:  # whatever storage says must reach rank 0, which waits for a word
            told = {"error": f"rank {self.rank}: {type(error).__name__}: {error}"}
        if "trace" in files:
            told["trace"] = asdict(files["trace"])
        else:
            self._unwritten = seen
        self._board.set(f"{key}/{self.rank}", json.dumps(told))
        if self.rank == 0:
            self._finish(record, key)

    def _put(self, file: str, data: bytes) -> File:
        return self._store.write(self._name, file, data)

    def _finish(self, record: Record, key: str) -> None:
        """Rank 0: hear all ranks and commit, or say why not."""
        told: list[dict[str, Any]] = []
        try:
            if self.taken_over is None:
                told = self._collect(key)
                self._commit(record, told)
        except TakenOverError as error:
            self.taken_over = str(error)
        except Exception as error:
            self.failures = [*self.failures, str(error)]
            print(
                f"checkpoint {self._name} was not committed ({error}); training goes on, and what was "
                f"committed before stands{f' ({self.committed})' if self.committed else ''}",
                flush=True,
            )
            # Half of it may fill a disk that is full.
            self._store.discard(
                self._name,
                [
                    f"{kind}-{rank:05d}{self._suffix[5:]}.{ending}"
                    for rank in range(self.ranks)
                    for kind, ending in KINDS.items()
                ],
            )
        else:
            if self.taken_over is None:
                self.failures, self.committed = [], self._name
                self._after_commit()
                try:
                    self._store.retain(self._keep.last, self._keep.epoch_ends)
                except OSError as error:
                    print(f"an old checkpoint was not removed: {error}", flush=True)

    def _commit(self, record: Record, told: list[dict[str, Any]]) -> None:
        self._parts += [
            bytes(self._store.read(self._name, File(**part["trace"]))) for part in told if "trace" in part
        ]
        if errors := [part["error"] for part in told if "error" in part]:
            raise OSError("; ".join(errors))
        root, stage, stop = self._store.root, record.cursor.stage, record.cursor.global_step
        shards = [Shard.from_dict(part["shard"]) for part in told]
        self._before_commit()
        cut_back(root, stage, self._traced_to)  # what a commit that failed has left
        write_trace(root, stage, self._traced_to, stop, self._parts)
        self._before_commit()
        self._store.commit(self._name, replace(record, shards=shards))
        self._traced_to, self._parts = stop, []

    def _collect(self, key: str) -> list[dict[str, Any]]:
        """What every rank told on the board, which is cleared of it."""
        keys = [f"{key}/{rank}" for rank in range(self.ranks)]
        while not self._board.check(keys):
            time.sleep(POLL_S)
        found = [json.loads(self._board.get(one)) for one in keys]
        for one in keys:
            self._board.delete_key(one)
        return found
