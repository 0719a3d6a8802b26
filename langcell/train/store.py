"""Checkpoints on storage: a folder each, committed by its record, verified when it is read.

Ray Train keeps checkpoints too, and is not used for them: it hands back the newest one unread, refuses to
start where one that it remembers is gone, forgets one that was reported less than a poll before a crash, and
knows one rule of retention. Here a checkpoint is

    checkpoints/stage2/step-00000120/weights-00000-of-00002.safetensors, optimizer-..., ..., checkpoint.json

on any pyarrow filesystem. Shards are written under their own names and `checkpoint.json` last, atomically:
without it the folder is an attempt that failed, removed at the next start. It holds the size and hash of
every file, so that a truncated or altered one is found before a byte of it is used (blake2b: about 1 GB/s a
core, beside a storage that is slower); the checkpoint before is taken then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow import fs
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from langcell.storage import digest, read_file, write_file

RECORD = "checkpoint.json"
DAMAGED = "damaged.json"
"""What the record of a damaged checkpoint is called from then on."""
FORMAT = 1
log = logging.getLogger(__name__)


class DamagedError(RuntimeError):
    """A checkpoint that cannot be read as it was written."""


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: the next step is `step` of `epoch` of `stage`; and what it is a run of."""

    stage: int
    epoch: int
    step: int
    global_step: int
    plan: str
    """Hash of the plan: corpus, order, batch."""
    skipped: int = 0
    """Steps of the stage whose update was left out."""
    skipped_in_row: int = 0
    """How many of them were the last ones."""


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its name, size (bytes) and hash."""

    name: str
    size: int
    hash: str


@dataclass(frozen=True)
class Shard:
    """What one rank wrote: parameters (names and shapes), their weights, and their optimiser's state."""

    shapes: dict[str, list[int]]
    weights: File
    optimizer: File

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """The inverse of `asdict`."""
        return cls(values["shapes"], File(**values["weights"]), File(**values["optimizer"]))


@dataclass(frozen=True)
class Record:
    """What checkpoint.json says.

    updates: optimiser steps that moved the weights; tau: the temperature; val_loss: loss on the `val` split,
    where it was computed; ends_epoch: whether it was made at an epoch's end.
    """

    cursor: Cursor
    updates: int
    tau: float
    val_loss: float | None = None
    ends_epoch: bool = False
    shards: list[Shard] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Raises DamagedError for what this version did not write."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise DamagedError(f"it has format {values['format']}, this version reads {FORMAT}")
            shards = [Shard.from_dict(shard) for shard in values.pop("shards")]
            return cls(**{**values, "cursor": Cursor(**values["cursor"]), "shards": shards})
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{RECORD} is damaged ({type(error).__name__}: {error})") from error


def name_of(global_step: int) -> str:
    """Folder of the checkpoint from which step `global_step` is the next."""
    return f"step-{global_step:08d}"


@retry(
    retry=retry_if_exception(
        lambda error: isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    ),
    stop=stop_after_attempt(5),
    wait=wait_exponential(max=30),
    reraise=True,
)
def _read(root: fs.FileSystem, path: str) -> pa.Buffer:
    """Storage that does not answer is no damage: the run must not go back for it."""
    with root.open_input_stream(path) as stream:
        return stream.read_buffer()


class Store:
    """The checkpoints of one stage of a run. root: filesystem of the run directory."""

    def __init__(self, root: fs.FileSystem, stage: int) -> None:
        self.root = root
        self.folder = f"checkpoints/stage{stage}"

    def names(self) -> list[str]:
        """Every folder of a checkpoint, whole or not, the newest first.

        Told by all files below: an object store knows no folders, and pyarrow finds them on Google's by marks
        that a copy of a run lacks.
        """
        selector = fs.FileSelector(self.folder, allow_not_found=True, recursive=True)
        paths = [info.path[len(self.folder) + 1 :] for info in self.root.get_file_info(selector)]
        names = {path.partition("/")[0] for path in paths}
        return sorted((name for name in names if name.startswith("step-")), reverse=True)

    def record(self, name: str) -> Record | None:
        """What a checkpoint says of itself; None where it was not committed. Raises DamagedError."""
        try:
            return Record.from_json(read_file(self.root, f"{self.folder}/{name}/{RECORD}"))
        except FileNotFoundError:
            return None

    def time(self, name: str) -> float | None:
        """When a checkpoint was committed (s since 1970); None where it was not."""
        info = self.root.get_file_info(f"{self.folder}/{name}/{RECORD}")
        return None if info.mtime is None else info.mtime.timestamp()

    def committed(self) -> Iterator[tuple[str, Record]]:
        """Checkpoints with a readable record, the newest first; damaged ones are passed over, with a
        warning."""
        for name in self.names():
            try:
                record = self.record(name)
            except DamagedError as error:
                log.warning("checkpoint %s/%s is passed over: %s", self.folder, name, error)
                continue
            if record is not None:
                yield name, record

    def best(self) -> list[tuple[str, Record]]:
        """The same, by validation loss (the lowest first), those without one by age after them."""

        def loss(found: tuple[str, Record]) -> float:
            loss = found[1].val_loss
            return loss if loss is not None and math.isfinite(loss) else math.inf

        return sorted(self.committed(), key=loss)

    def write(self, name: str, file: str, data: bytes) -> File:
        """Write one file of a checkpoint that is not committed yet. Raises OSError."""
        folder = f"{self.folder}/{name}"
        self.root.create_dir(folder, recursive=True)
        with self.root.open_output_stream(f"{folder}/{file}") as stream:
            stream.write(data)
        return File(file, len(data), digest(data))

    def commit(self, name: str, record: Record) -> None:
        """From here on the checkpoint exists. Raises OSError."""
        write_file(self.root, f"{self.folder}/{name}/{RECORD}", record.to_json())

    def read(self, name: str, file: File) -> pa.Buffer:
        """The bytes of a file. Raises DamagedError where they are not those that were written."""
        path = f"{self.folder}/{name}/{file.name}"
        try:
            data = _read(self.root, path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing") from error
        if len(data) != file.size:
            raise DamagedError(f"{path} has {len(data)} bytes, {file.size} were written")
        if digest(data) != file.hash:
            raise DamagedError(f"{path} is not what was written: its hash differs")
        return data

    def set_aside(self, name: str) -> None:
        """From here on a damaged checkpoint is none: it is not met again, nor kept in another's stead."""
        self.root.move(f"{self.folder}/{name}/{RECORD}", f"{self.folder}/{name}/{DAMAGED}")

    def discard(self, name: str, files: list[str]) -> None:
        """Remove files of a checkpoint that was not committed, and nothing that others wrote beside them."""
        folder = f"{self.folder}/{name}"
        for file in files:
            with contextlib.suppress(OSError):
                self.root.delete_file(f"{folder}/{file}")
        with contextlib.suppress(OSError):
            if not self.root.get_file_info(fs.FileSelector(folder)):
                self.root.delete_dir(folder)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its record first: half of it is none."""
        path = f"{self.folder}/{name}"
        if self.root.get_file_info(f"{path}/{RECORD}").type != fs.FileType.NotFound:
            self.root.delete_file(f"{path}/{RECORD}")
        self.root.delete_dir(path)

    def clean(self) -> None:
        """Remove what was not committed; what was set aside stays, to be looked at."""
        for name in self.names():
            paths = [f"{self.folder}/{name}/{record}" for record in (RECORD, DAMAGED)]
            if all(info.type == fs.FileType.NotFound for info in self.root.get_file_info(paths)):
                self.remove(name)

    def retain(self, last: int, epoch_ends: bool) -> None:
        """Keep the `last` newest, the best by validation loss and, if told, those of epoch ends."""
        found = list(self.committed())
        kept = {name for name, _ in found[:last]} | {name for name, _ in self.best()[:1]}
        kept |= {name for name, record in found if epoch_ends and record.ends_epoch}
        for name, _ in found:
            if name not in kept:
                self.remove(name)
