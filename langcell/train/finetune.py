"""Fine-tuning: what one worker does, and, as a world of one, what a call in this process does.

A step takes `batch` cells of an order that is a function of (seed, epoch); rank r of W takes every W-th of
them, so that each cell is seen exactly once an epoch whatever W is, the last batch being what is left. Its
cells are packed by a budget of tokens, one forward and one backward each, without padding. The loss is the
sum over the step's cells by their global count: DDP's mean over ranks, times W. A rank without a cell runs
one of the others' with weight 0, for DDP waits for every rank.

Dropout is seeded by (seed, step, rank, forward), the rate is a function of the step, and an epoch's end is
committed whole (`epochs`): a fine-tuning that was killed goes on from there and ends with the weights that it
would have had.

Shape suffixes: N examples, B those of a forward.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from langcell.batch import Packed
from langcell.errors import RunError
from langcell.inference.embed import spans
from langcell.objective.draws import key
from langcell.objective.few_shot import FewShot
from langcell.objective.gather import sum_over_ranks, world
from langcell.objective.supervised import Supervised
from langcell.train.epochs import Epochs, Record
from langcell.train.options import FitOptions

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
HEAD = "classifier.head."
"""How the parameters of a fresh head are named."""
DROPOUT = 11
"""Purpose of the draws (`draws.key`)."""


class Diverged(RunError):
    """A loss or weights that are no numbers, which every rank finds at once: another try would end alike."""


@dataclass(frozen=True)
class Examples:
    """Cells with their answers. cells: N sentences, or states [N, W] where the encoder is frozen; target:
    [N] or [N, O], as the module's loss takes it."""

    cells: Packed | Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each cell (int64); 1 where a state stands for them."""
        if isinstance(self.cells, Packed):
            return self.cells.lengths_B.numpy().astype(np.int64)
        return np.ones(len(self), np.int64)

    def select(self, rows_B: np.ndarray) -> Examples:
        """Examples `rows_B` (int64), in that order."""
        rows = torch.from_numpy(rows_B)
        cells = self.cells.select(rows) if isinstance(self.cells, Packed) else self.cells[rows]
        return Examples(cells, self.target[rows])


@dataclass(frozen=True)
class Task:
    """What is fine-tuned.

    module: `Supervised` or `FewShot`; its parameters with `requires_grad` train. val: without cells, the
    last epoch is the best. lr: peak rate of all but a fresh head. folder: where epochs are committed; None:
    nowhere.
    """

    module: Supervised | FewShot
    train: Examples
    val: Examples
    lr: float
    options: FitOptions
    folder: Path | None = None
    fingerprint: str = ""


def fit(
    task: Task, device: torch.device, told: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """Fine-tune `task.module` in place, from its newest committed epoch where there is one; the history:
    `epoch` (from 1), `loss`, `val_loss` (None without cells), `seconds` of each epoch. A collective.

    Afterwards the module has the weights of the best epoch, in evaluation mode, and no gradients. told:
    gets each row on rank 0 when the epoch is committed. Raises InputError where the folder holds another
    fine-tuning, Diverged where the loss, or a weight, is no number.
    """
    fitting = _Fitting(task, device)
    for epoch in range(fitting.done, task.options.epochs):
        row = fitting.run(epoch)
        if fitting.rank == 0:
            fitting.commit()
            told(row)
    return fitting.finish()


def work(config: dict[str, Any]) -> str | None:
    """The `train_loop_per_worker` of a fine-tuning; what it says of one that diverged, which is not raised
    because Ray Train would start the workers again. config: `task`, a reference to the task."""
    import ray.train.torch  # here: who fits in a process of its own needs none

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))

    def told(row: dict[str, Any]) -> None:
        val = "" if row["val_loss"] is None else f", val {row['val_loss']:.4f}"
        print(f"epoch    {row['epoch']}: loss {row['loss']:.4f}{val}, {row['seconds']:.1f} s", flush=True)

    task = copy.deepcopy(ray.get(config["task"]))  # shared memory is read-only
    try:
        fit(task, ray.train.torch.get_device(), told)
    except Diverged as error:
        return str(error)
    return None


class _Fitting:
    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device, (self.rank, self.world) = task, device, world()
        self.module = task.module.to(device)
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.store = None if task.folder is None else Epochs(task.folder, task.fingerprint)
        self.steps = math.ceil(len(task.train) / task.options.batch)
        self.optimizer = torch.optim.AdamW(self._groups(), fused=True)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        record = self._agreed()
        if record is not None:
            self._resume(record)
        self.done = len(self.history)
        self.schedule = self._make_schedule()
        bf16 = task.options.precision == "bf16" or (
            task.options.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.ddp: nn.Module = self.module
        if self.world > 1:
            # Ranks run other numbers of forwards, so none may be a collective; buffers are constants.
            self.ddp = DistributedDataParallel(self.module, broadcast_buffers=False)

    def run(self, epoch: int) -> dict[str, Any]:
        """One epoch and its validation; the row of history."""
        started, options = time.monotonic(), self.task.options
        order = np.random.default_rng([options.seed, epoch]).permutation(len(self.task.train))
        self.module.train()
        total = torch.zeros((), device=self.device)
        for place in range(self.steps):
            rows = order[place * options.batch : (place + 1) * options.batch]
            total += self._step(rows, epoch * self.steps + place)
        loss = float(sum_over_ranks(total)) / len(self.task.train)
        val_loss = self._validate()
        sound = all(bool(parameter.isfinite().all()) for parameter in self.parameters.values())
        if not math.isfinite(loss + (val_loss or 0.0)) or not sound:
            raise Diverged(
                f"epoch {epoch + 1}: the loss is {loss}, of the validation cells {val_loss}"
                + ", and weights are no numbers" * (not sound)
                + "; lower fit.lr and fit.head_lr, in another run.dir"
            )
        row = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_loss": val_loss,
            "seconds": time.monotonic() - started,
        }
        before = [past["val_loss"] for past in self.history]
        if val_loss is None or not before or val_loss < min(before):
            self.best_epoch = epoch + 1
            self.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self.history.append(row)
        return row

    def _step(self, rows: np.ndarray, step: int) -> Tensor:
        """One optimiser step; the sum of the losses of this rank's cells."""
        mine = rows[self.rank :: self.world]
        weight = 1.0 if len(mine) else 0.0
        parts = list(self._parts(self.task.train, mine if len(mine) else rows[:1]))
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            torch.manual_seed(key(self.task.options.seed, step, DROPOUT, self.rank, i))
            more = self.world > 1 and i + 1 < len(parts)
            with self.ddp.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                loss = self._loss(self.ddp, part, weight)
                (loss * (self.world / len(rows))).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.task.options.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def _validate(self) -> float | None:
        val = self.task.val
        if not len(val):
            return None
        self.module.eval()
        total = torch.zeros((), device=self.device)
        mine = np.arange(len(val))[self.rank :: self.world]
        for part in self._parts(val, mine):
            total += self._loss(self.module, part, 1.0)
        return float(sum_over_ranks(total)) / len(val)

    def _parts(self, examples: Examples, rows: np.ndarray) -> Iterator[Examples]:
        """Some examples, as many at a time as the budget of tokens allows."""
        costs = examples.lengths_N[rows] + self.module.extra_tokens
        for start, stop in spans(costs, self.task.options.batch_tokens):
            yield examples.select(rows[start:stop])

    def _loss(self, module: nn.Module, part: Examples, weight: float) -> Tensor:
        weight_B = torch.full((len(part),), weight, device=self.device)
        with self.autocast:
            return module(part.cells.to(self.device), part.target.to(self.device), weight_B)

    def commit(self) -> None:
        """Write the epoch that just ended."""
        if self.store is None:
            return
        moments = {
            f"{moment}.{name}": self.optimizer.state[p][moment]
            for name, p in self.parameters.items()
            for moment in MOMENTS
        }
        record = self.store.make(len(self.history), self.best_epoch, self.history)
        self.store.commit(record, dict(self.parameters), moments)

    @torch.no_grad()
    def finish(self) -> list[dict[str, Any]]:
        """Take the weights of the best epoch; the history."""
        for name, weight in self.best.items():
            self.parameters[name].copy_(weight)
        self.module.eval()
        return self.history

    def _agreed(self) -> Record | None:
        """The epoch to go on from: rank 0 looks, for another's view of a shared folder may be older."""
        found: list[Any] = [None]
        if self.rank == 0 and self.store is not None:
            found = [self.store.newest()]
        if self.world > 1:
            dist.broadcast_object_list(found, 0)
        return found[0]

    @torch.no_grad()
    def _resume(self, record: Record) -> None:
        assert self.store is not None
        weights, moments = self.store.read(record.epochs)
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            self.optimizer.state[parameter] = {
                moment: moments[f"{moment}.{name}"].to(self.device) for moment in MOMENTS
            }
        self.history, self.best_epoch = list(record.history), record.best
        self.best = weights if record.best == record.epochs else self.store.read(record.best)[0]

    def _groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: head or not, with or without decay."""
        options = self.task.options
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault((name.startswith(HEAD), parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": (rate := options.head_lr if is_head else self.task.lr),
                "initial_lr": rate,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ]

    def _make_schedule(self) -> torch.optim.lr_scheduler.LambdaLR:
        options = self.task.options
        total = self.steps * options.epochs
        # From the schedule's second point on: at its first the rate is zero, a step that trains nothing.
        return get_linear_schedule_with_warmup(
            self.optimizer,
            max(1, int(options.warmup_share * total)),
            total + 1,
            last_epoch=self.done * self.steps,
        )
