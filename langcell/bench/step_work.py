"""What the step benchmark measures: optimiser steps, each kind in a process of its own (`bench.turns`).

Ours and the straightforward step run in the same engine (DeepSpeed as training has it, a group of one rank)
with the same weights, rates of dropout and micro-batches; a few cells go through it first, so that nothing
is left to allocate or compile. Operations are counted from the masks and pairs of the weights at the start,
without dropout: as training goes on other texts become hard, but not of other lengths.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from langcell.batch import MicroBatch
from langcell.bench import batches
from langcell.bench.batches import Dealt
from langcell.bench.hf_step import ALL, HfStep, Savings, work_of
from langcell.bench.processes import MB, Work
from langcell.model import flops
from langcell.model.interop import build_model
from langcell.model.options import ModelOptions
from langcell.objective.cached import views_of
from langcell.objective.lanes import Lanes
from langcell.objective.options import ObjectiveOptions
from langcell.objective.stages import LOSSES, Stage
from langcell.train.engine import build_engine, use_bf16
from langcell.train.options import TrainOptions
from langcell.train.profile import WAIT, WARMUP, Profile

WARM_CELLS = 2
TRACED = 2
"""Steps of a trace."""


@dataclass(frozen=True)
class Kind:
    """A kind of step. savings: of the straightforward step, None for ours; view: `objective.mgm_view`."""

    savings: Savings | None
    view: Literal["own", "shared"] = "own"


@dataclass(frozen=True)
class StepTask:
    """A stage over the first micro-batches of a corpus.

    directory, vocab_size: of the corpus; cell_length: longest sentence (tokens); micro_batch: cells;
    count: micro-batches; device: `cpu` or `cuda`; trace: folder and name of a trace of ours, written after
    its first turn (None: none). Losses are the recipe's.
    """

    directory: str
    vocab_size: int
    cell_length: int
    model: ModelOptions
    stage: int
    micro_batch: int
    count: int
    seed: int
    device: str
    trace: Path | None = None
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    def deal(self) -> Dealt:
        return batches.deal(self.directory, self.model.text_init, self.micro_batch, self.count, self.seed)

    def build(self, dealt: Dealt, dropout: bool = True) -> Stage:
        """The stage with its starting weights, on the device."""
        model = build_model(self.model, self.vocab_size, self.cell_length, self.seed)
        if not dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        stage = Stage(
            model,
            self.objective,
            stage=self.stage,
            cls=self.vocab_size - 1,
            seed=self.seed,
            text_train=self.model.text_train,
            texts=dealt.texts.to(self.device),
        )
        return stage.to(self.device)


@dataclass(frozen=True)
class Stepped:
    """which: micro-batches; seconds: of each one's step; losses: of the last; peak_mb: of GPU memory (None:
    no GPU)."""

    which: list[int]
    seconds: list[float]
    losses: dict[str, float]
    peak_mb: float | None


def steps(task: StepTask, kind: Kind) -> Callable[[list[int], bool], Stepped]:
    """Optimiser steps of a kind: given which of the task's micro-batches, and whether they all go through
    once before they are measured (on a GPU, whose kernels and allocator warm up)."""
    _begin(task)
    dealt, device = task.deal(), torch.device(task.device)
    stage = replace(task, objective=replace(task.objective, mgm_view=kind.view)).build(dealt)
    module = stage if kind.savings is None else HfStep(stage, kind.savings)
    options = TrainOptions(num_workers=1, global_batch=task.micro_batch, micro_batch=task.micro_batch)
    # So early in so long a schedule the weights hardly move, and all steps do the same work.
    engine = build_engine(module, options, lr=options.lr, steps=1 << 20, device=device)
    engine.train()

    def step(number: int, batch: MicroBatch) -> tuple[float, dict[str, Tensor]]:
        batch = batch.to(device)
        torch.manual_seed(number)
        _wait(device)
        began = time.perf_counter()
        losses = engine(batch, number)
        engine.backward(losses["total"])
        engine.step()
        _wait(device)
        return time.perf_counter() - began, losses

    def work(which: list[int], warm: bool) -> Stepped:
        for number in which if warm else ():
            step(number, dealt.batches[number])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        done = [step(number, dealt.batches[number]) for number in which]
        peak = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / MB
            torch.cuda.empty_cache()  # the other processes have their turns on the same device
        if task.trace is not None and kind == Kind(None) and not task.trace.with_suffix(".txt").exists():
            with Profile(task.trace.parent, task.trace.name, TRACED) as profile:
                for number in islice(cycle(which), WAIT + WARMUP + TRACED):
                    step(number, dealt.batches[number])
                    profile.step()
        values = {name: float(done[-1][1][name].detach()) for name in LOSSES[task.stage]}
        return Stepped(which, [seconds for seconds, _ in done], values, peak)

    step(0, batches.first_cells(dealt.batches[0], WARM_CELLS))
    return work


def survey(task: StepTask, kinds: dict[str, Kind], compared_cells: int) -> Work:
    """What is measured: operations of each kind of step on each micro-batch (those of ours as `ALL`), the
    law of lengths, the model's parameters, the device and its peak in bf16 (FLOP/s, None: unknown), and how
    far ours is from the straightforward step on so many cells (`compare`)."""
    _begin(task)
    dealt, device = task.deal(), torch.device(task.device)
    stage = task.build(dealt, dropout=False).eval()
    model = stage.model
    shape = (model.cell_bert.config, model.text_bert.config, model.cell_proj.out_features)

    @torch.no_grad()
    def counted(number: int, batch: MicroBatch) -> dict[str, float]:
        views = views_of([stage(batch, number, look=0)])
        pairs = stage.compare(views, [batch], Lanes.here(), number).pairs
        found = {}
        for name, kind in kinds.items():
            stage.options = replace(task.objective, mgm_view=kind.view)
            work = work_of(stage, batch, stage.mask(batch, number), pairs, kind.savings or ALL)
            found[name] = flops.step_flops(work, *shape).total
        stage.options = task.objective
        return found

    def work() -> dict[str, Any]:
        each = [counted(number, batch.to(device)) for number, batch in enumerate(dealt.batches)]
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        return {
            "flops": {name: [found[name] for found in each] for name in kinds},
            "lengths": batches.length_law(task.directory, dealt),
            "parameters": {
                "all": sum(p.numel() for p in model.parameters()),
                "cell_encoder": sum(p.numel() for p in model.cell_bert.parameters()),
                "trained": sum(p.numel() for p in stage.parameters() if p.requires_grad),
            },
            "device": {
                "name": name,
                "peak_flops": flops.peak_flops(name),
                "bf16": use_bf16(TrainOptions(), device),
            },
            "equal": compare(stage, batches.first_cells(dealt.batches[0], compared_cells).to(device)),
        }

    return work


def compare(stage: Stage, batch: MicroBatch) -> dict[str, Any]:
    """How far ours is from the straightforward step, which takes over the stage; without dropout.

    Losses: the largest difference relative to the loss. Gradients: `gradient_difference`.
    """

    def run(module: torch.nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        module.train().zero_grad()
        losses = module(batch, 0)
        losses["total"].backward()
        values = {name: float(losses[name].detach()) for name in LOSSES[stage.stage]}
        named = module.named_parameters()
        return values, {n.removeprefix("stage."): p.grad.clone() for n, p in named if p.grad is not None}

    losses, gradients = run(stage)
    other_losses, other_gradients = run(HfStep(stage))
    if not all(map(math.isfinite, (*losses.values(), *other_losses.values()))):
        raise RuntimeError(f"losses that are no numbers: {losses}, {other_losses}")
    if gradients.keys() != other_gradients.keys():
        raise RuntimeError("ours and the straightforward step train other parameters")
    return {
        "cells": len(batch),
        "losses": losses,
        "loss_difference": max(abs(losses[name] / other_losses[name] - 1) for name in losses),
        **gradient_difference(gradients, other_gradients),
    }


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the difference relative to the baseline's: of all parameters, and of the worst one.

    Parameters whose gradient is rounding (keys' biases shift all scores alike) and below 1e-4 of the whole
    count by that part of the whole.
    """

    def norm(gradients: list[Tensor]) -> float:
        return float(torch.stack([gradient.double().norm() for gradient in gradients]).norm())

    whole = norm(list(theirs.values()))
    apart = {name: norm([ours[name] - theirs[name]]) for name in theirs}
    worst = max(apart[name] / max(norm([theirs[name]]), 1e-4 * whole) for name in theirs)
    total = norm([ours[name] - theirs[name] for name in theirs])
    return {"gradient_difference": total / whole, "worst_gradient_difference": worst}


def _begin(task: StepTask) -> None:
    """A group of this process alone, and as many threads as it has CPUs."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it too
    backend = "gloo" if task.device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
