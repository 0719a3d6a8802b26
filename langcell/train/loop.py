"""What one Ray Train worker does: one stage, from its first micro-batch to its last checkpoint.

Both stages run this loop; they differ in their losses alone. Each step: the micro-batches of the rank's
lanes from its stream, one optimiser step (`step`), a row of metrics. At an epoch's end: the losses on the
`val` split, zero-shot figures from the function that the recipe hands in, a checkpoint.

Shape suffixes: L losses, N counts of work, W ranks.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from ray.experimental import tqdm_ray

from langcell.batch import MicroBatch, TextTable
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan
from langcell.corpus.stream import Position, deal_round, micro_batch, stream
from langcell.corpus.text_table import load_text_table
from langcell.model.flops import Work, mfu, peak_flops, step_flops
from langcell.model.interop import build_model, load_tokenizer
from langcell.model.langcell import LangCell
from langcell.model.options import ModelOptions
from langcell.objective.lanes import Lanes
from langcell.objective.options import ObjectiveOptions
from langcell.objective.stages import LOSSES, Stage
from langcell.train import checkpoint as ckpt
from langcell.train.engine import build_engine
from langcell.train.metrics import Metrics
from langcell.train.options import TrainOptions
from langcell.train.profile import Profile
from langcell.train.step import run_step


@dataclass(frozen=True)
class StageTask:
    """All that a worker must know to run one stage; travels to it pickled."""

    stage: int
    name: str
    run_dir: str
    plan: Plan
    val_plan: Plan | None
    first_step: int
    """Global step at which the stage begins."""
    vocab_size: int
    cell_length: int
    text_length: int
    short_share: float
    init: str | None
    """model.safetensors of the stage before; None: the starting weights of `model`."""
    model: ModelOptions
    objective: ObjectiveOptions
    train: TrainOptions
    corpus: CorpusOptions
    evaluate: Callable[[LangCell], dict[str, Any]] | None
    """Zero-shot figures of a model in eval mode; called on every rank alike."""

    @property
    def epochs(self) -> int:
        return self.train.stage1_epochs if self.stage == 1 else self.train.stage2_epochs

    @property
    def lr(self) -> float:
        if self.stage == 1 and self.train.stage1_lr is not None:
            return self.train.stage1_lr
        return self.train.lr


def run_stage(task: StageTask) -> None:
    """The `train_loop_per_worker` of a stage."""
    _Worker(task).run()


@dataclass(frozen=True)
class _Told:
    """Of all ranks: losses, tokens and work of a step, and the longest time (s) that one of them waited for
    data: the others wait for that rank in their next collective."""

    losses: dict[str, float]
    tokens: float
    work: Work
    wait: float


class _Worker:
    def __init__(self, task: StageTask) -> None:
        self.task = task
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        texts = load_text_table(task.corpus.dir, load_tokenizer(task.model.text_init), task.text_length)
        self.texts: TextTable = texts
        self.lanes = Lanes.here(task.plan.lanes)
        cuda = self.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(self.device)) if cuda else None
        self.engine = self._engine()
        self.start = Position(0, 0)
        latest = ray.train.get_checkpoint()
        if latest is not None:
            with latest.as_directory() as directory:
                cursor = ckpt.load(self.engine, Path(directory), task.plan.hash)
            self.start = Position(cursor.epoch, cursor.step)

    def _engine(self) -> DeepSpeedEngine:
        task = self.task
        model = build_model(task.model, task.vocab_size, task.cell_length, task.train.seed)
        objective = task.objective
        if task.init is not None:
            ckpt.load_weights(model, Path(task.init))
            objective = replace(objective, tau=ckpt.read_tau(Path(task.init)))
        stage = Stage(
            model,
            objective,
            stage=task.stage,
            cls=task.vocab_size - 1,
            seed=task.train.seed,
            text_train=task.model.text_train,
            texts=self.texts.to(self.device),
        )
        if task.stage == 2 and stage.text_locked:
            stage.to(self.device).pool_table()
        return build_engine(
            stage,
            task.train,
            lr=task.lr,
            steps=task.epochs * task.plan.steps,
            device=self.device,
            lanes=self.lanes.each,
        )

    def run(self) -> None:
        task, plan = self.task, self.task.plan
        first = self._global_step(self.start)
        metrics = Metrics(Path(task.run_dir), task.name, task.stage, first) if self.rank == 0 else None
        total = task.epochs * plan.steps
        bar = tqdm_ray.tqdm(total=total, desc=f"stage {task.stage}") if self.rank == 0 else None
        if bar is not None:
            bar.update(first - task.first_step)
        steps = task.train.profile if self.rank == 0 else 0
        with Profile(Path(task.run_dir) / "profile", f"stage{task.stage}", steps) as profile:
            self._steps(metrics, bar, profile)
        if metrics is not None and bar is not None:
            metrics.close()
            bar.close()

    def _steps(self, metrics: Metrics | None, bar: tqdm_ray.tqdm | None, profile: Profile) -> None:
        task, plan = self.task, self.task.plan
        rows: list[dict[str, float]] = []
        waited = time.perf_counter()
        for position, batches in self._batches():
            began = time.perf_counter()
            shares = run_step(self.engine, self.lanes, batches, self._global_step(position))
            tokens = sum(batch.cells.tokens_T.numel() for batch in batches)
            told = self._global(shares, tokens, began - waited)
            losses = told.losses
            ended = time.perf_counter()
            seconds = ended - waited
            row = {
                "step": self._global_step(position),
                "epoch": position.epoch,
                "stage": task.stage,
                "time": time.time(),
                "cells_per_s": plan.global_batch / seconds,
                "tokens_per_s": told.tokens / seconds,
                "mfu": self._mfu(told.work, seconds),
                "data_wait": told.wait / seconds,
                "lr": self.engine.get_lr()[0],
                "grad_norm": float(self.engine.get_global_grad_norm()),
                "ctm_empty": float(shares["empty"]),
            }
            waited = ended
            rows.append(losses)
            ends_epoch = position.step == plan.steps - 1
            val = self._validate() if ends_epoch else {}
            if metrics is not None and bar is not None:
                metrics.write(row, {**losses, **val})
                bar.update(1)
            if ends_epoch:
                self._end_epoch(position.epoch, rows, val)
                rows = []
                waited = time.perf_counter()
            profile.step()

    def _global_step(self, position: Position) -> int:
        return self.task.first_step + position.epoch * self.task.plan.steps + position.step

    def _batches(self) -> Iterator[tuple[Position, list[MicroBatch]]]:
        task = self.task
        for chatty in ("ray.train", "ray.data"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        steps = stream(
            task.corpus.dir,
            task.plan,
            lanes=self.lanes.owned,
            epochs=task.epochs,
            start=self.start,
            prefetch=task.corpus.prefetch,
        )
        for position, rows in steps:
            yield position, self._micro_batches(rows, position.epoch, task.short_share)

    def _micro_batches(self, rows: pa.Table, epoch: int, short_share: float) -> list[MicroBatch]:
        seed = self.task.train.seed
        return [
            micro_batch(rows.slice(i, 1), self.texts, epoch=epoch, short_share=short_share, seed=seed).to(
                self.device
            )
            for i in range(len(rows))
        ]

    def _global(self, shares: dict[str, torch.Tensor], tokens: float = 0.0, wait: float = 0.0) -> _Told:
        """What all ranks have to tell of a step, in one small collective."""
        names = LOSSES[self.task.stage]
        losses_L = torch.stack([shares[name].float() for name in names])
        waits_W = losses_L.new_zeros(self.lanes.ranks)
        waits_W[self.lanes.rank] = wait
        parts = [losses_L, losses_L.new_tensor([tokens]), shares["work"].float(), waits_W]
        values = torch.cat(parts)
        dist.all_reduce(values)
        losses, tokens_1, work_N, waits = values.split([len(part) for part in parts])
        return _Told(
            dict(zip(names, losses.tolist(), strict=True)),
            tokens_1.item(),
            Work(*work_N.tolist()),
            max(waits.tolist()),
        )

    def _mfu(self, work: Work, seconds: float) -> float | None:
        """Share of what the devices could do at their bf16 peak; None where that is not known (a CPU)."""
        if self._peak is None:
            return None
        model = self.engine.module.model
        done = step_flops(
            work,
            model.cell_bert.config,
            model.text_bert.config,
            model.cell_proj.out_features,
            locked=self.engine.module.text_locked,
        )
        return mfu(done.total, seconds, self._peak * self.lanes.ranks)

    def _end_epoch(self, epoch: int, rows: list[dict[str, float]], val: dict[str, float]) -> None:
        task = self.task
        report: dict[str, Any] = {"stage": task.stage, "epoch": epoch}
        report |= {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        report |= val
        last = epoch == task.epochs - 1
        if task.evaluate is not None and not last and (epoch + 1) % task.train.evaluate_epochs == 0:
            report |= self._evaluate()
        if self.rank == 0:
            figures = "  ".join(
                f"{name} {value:.3f}" for name, value in report.items() if isinstance(value, float)
            )
            print(f"stage {task.stage}  epoch {epoch + 1}/{task.epochs}  {figures}", flush=True)
        if last or (epoch + 1) % task.train.checkpoint_epochs == 0:
            self._checkpoint(epoch, report)

    def _validate(self) -> dict[str, float]:
        """Mean losses over whole global batches of the `val` split, dropout off, the same draws each time."""
        plan = self.task.val_plan
        if plan is None:
            return {}
        self.engine.eval()
        sums: dict[str, float] = {}
        for windows in zip(*(plan.windows(0, lane) for lane in self.lanes.owned), strict=True):
            rows, k = deal_round(self.task.corpus.dir, plan, windows), len(windows)
            for i in range(0, len(rows), k):
                batches = self._micro_batches(rows.slice(i, k), 0, 0.0)
                told = self._global(run_step(self.engine, self.lanes, batches, 0, learn=False))
                for name, loss in told.losses.items():
                    sums[name] = sums.get(name, 0.0) + loss / plan.steps
        self.engine.train()
        weights = self.engine.module.weights
        total = sum(weights[name] * loss for name, loss in sums.items())
        return {f"val_{name}": loss for name, loss in sums.items()} | {"val_loss": total}

    def _evaluate(self) -> dict[str, Any]:
        self.engine.eval()
        assert self.task.evaluate is not None
        with torch.inference_mode():
            figures = self.task.evaluate(self.engine.module.model)
        self.engine.train()
        return figures

    def _checkpoint(self, epoch: int, report: dict[str, Any]) -> None:
        following = Position(epoch + 1, 0)
        cursor = ckpt.Cursor(
            self.task.stage, following.epoch, 0, self._global_step(following), self.task.plan.hash
        )
        with tempfile.TemporaryDirectory() as directory:
            ckpt.save(self.engine, Path(directory), cursor)
            ray.train.report(
                report,
                checkpoint=ray.train.Checkpoint.from_directory(directory),
                checkpoint_dir_name=f"epoch-{epoch + 1:04d}",
            )
