"""How a model is judged while it trains: its losses on the `val` split, and what the recipe wants to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from langcell.corpus.stream import deal_round
from langcell.model.langcell import LangCell
from langcell.objective.stages import LOSSES
from langcell.train.setup import Ready
from langcell.train.step import run_step
from langcell.train.task import StageTask
from langcell.train.told import tell


def validate(task: StageTask, ready: Ready, alive: Callable[[], None]) -> dict[str, float]:
    """Mean losses over whole global batches of the `val` split, dropout off, the same draws each time:
    `val_NAME`, and `val_loss`, weighted as in training. alive: called before each batch. A collective. Empty
    where there is no such split."""
    plan, engine, lanes = task.val_plan, ready.engine, ready.lanes
    if plan is None:
        return {}
    engine.eval()
    sums: dict[str, float] = {}
    for windows in zip(*(plan.windows(0, lane) for lane in lanes.owned), strict=True):
        rows, k = deal_round(task.corpus.dir, plan, windows), len(windows)
        for i in range(0, len(rows), k):
            alive()
            batches = ready.micro_batches(rows.slice(i, k), 0, 0.0)
            shares = run_step(engine, lanes, batches, 0, learn=False)
            for name, loss in tell(shares, LOSSES[task.stage], lanes).losses.items():
                sums[name] = sums.get(name, 0.0) + loss / plan.steps
    engine.train()
    weights = engine.module.weights
    total = sum(weights[name] * loss for name, loss in sums.items())
    return {f"val_{name}": loss for name, loss in sums.items()} | {"val_loss": total}


@torch.inference_mode()
def evaluate(figures: Callable[[LangCell], dict[str, Any]], engine: DeepSpeedEngine) -> dict[str, Any]:
    """The figures of the engine's model, in eval mode."""
    engine.eval()
    found = figures(engine.module.model)
    engine.train()
    return found
