"""Checkpoints of a fine-tuning: one file an epoch, whole or absent.

Data and steps are few, so an epoch is what can be lost: weights that train, AdamW's moments and the history
go into one safetensors file under another name, which is then moved into place. The newest is where a
restart goes on, the best by validation loss is the result; others are removed. A file says which
fine-tuning it belongs to, and another's is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from langcell.errors import InputError
from langcell.files import write_whole


@dataclass(frozen=True)
class Record:
    """After so many epochs: which of them is the best so far (from 1), and what was measured in each."""

    fingerprint: str
    epochs: int
    best: int
    history: list[dict[str, Any]]


class Epochs:
    """The files in `folder`. fingerprint: of all that makes the fine-tuning the one it is."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint

    def newest(self) -> Record | None:
        """Of the newest whole epoch; None where there is none.

        Raises InputError where the folder holds epochs of another fine-tuning.
        """
        for path in sorted(self._folder.glob("epoch-*.safetensors"), reverse=True):
            try:
                with safe_open(path, "pt") as file:
                    record = Record(**json.loads(file.metadata()["record"]))
            except (SafetensorError, TypeError, KeyError, ValueError):
                continue  # damaged since it was written
            if record.fingerprint != self._fingerprint:
                raise InputError(
                    f"run.dir: {self._folder.parent} holds a fine-tuning of other cells, options or weights. "
                    "Choose another (--run.dir DIR), or delete it"
                )
            return record
        return None

    def read(self, epoch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments after so many epochs, by name, on the CPU."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        with safe_open(self._path(epoch), "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                kind, _, rest = name.partition("/")
                found[kind == "moment"][rest] = file.get_tensor(name)
        return found

    def commit(self, record: Record, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Write an epoch, then remove those that are neither it nor the best."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"moment/{name}": tensor for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self._path(record.epochs), save(tensors, {"record": json.dumps(asdict(record))}))
        kept = {self._path(record.epochs), self._path(record.best)}
        for path in self._folder.glob("epoch-*.safetensors"):
            if path not in kept:
                path.unlink()

    def make(self, epochs: int, best: int, history: list[dict[str, Any]]) -> Record:
        """A record of this fine-tuning."""
        return Record(self._fingerprint, epochs, best, history)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:04d}.safetensors"
