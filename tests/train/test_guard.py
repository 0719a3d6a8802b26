"""Steps that are no numbers, or too large, leave weights and moments alone, and the schedule goes on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from langcell.bench.ranks import run_ranks

LR, STEPS = 1e-2, 10


class Sum(nn.Module):
    """A loss whose gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


GRADIENTS = {"plain": 1.0, "inf": math.inf, "nan": math.nan, "large": 1e4, "loss": 1.0}
"""By what it is; of `loss` the gradient is fine and the loss is told to be none."""


def run(rank: int) -> dict[tuple[str, int, int], list[Any]]:
    """By precision, ZeRO stage and lanes: after each step the weights, counts, rate and AdamW's own count."""
    from langcell.train.checkpoint import updates, whole_weights
    from langcell.train.engine import build_engine
    from langcell.train.guard import Guard
    from langcell.train.options import TrainOptions

    seen = {}
    for precision in ("fp32", "bf16"):
        for zero in (1, 2, 3):
            for lanes in (1, 2):
                engine = build_engine(
                    Sum(),
                    TrainOptions(zero=zero, precision=precision, weight_decay=0.0, clip=1.0),
                    lr=LR,
                    steps=STEPS,
                    device=torch.device("cpu"),
                    lanes=lanes,
                )
                guard, found = Guard(engine, 1000.0, 0, 0), []
                for kind in ("plain", "inf", "nan", "large", "loss", "plain"):
                    for lane in range(lanes):
                        # One rank and one lane alone have it: all decide alike.
                        odd = rank == 1 and lane == 0
                        value = GRADIENTS[kind] if odd else 1.0
                        gradient = torch.full((5,), value, dtype=engine.module.weight.dtype)
                        engine.backward(engine(gradient))
                        if lane == lanes - 1:
                            guard.judge([1.0, math.nan if kind == "loss" else 2.0])
                        engine.step()
                    guard.count()
                    weights = whole_weights(engine)["weight"].tolist()
                    found.append((weights, guard.skipped, guard.in_row, engine.get_lr()[0], updates(engine)))
                seen[precision, zero, lanes] = found
                engine.destroy()
    return seen


def test_a_step_that_is_skipped_moves_nothing() -> None:
    for case, (first, *middle, last) in run_ranks(run, 2)[0].items():
        weights, skipped, in_row, rate, updates = first
        assert (skipped, in_row, updates) == (0, 0, 1), case
        assert weights != [1.0] * 5, case
        for number, step in enumerate(middle, 1):
            assert step[0] == weights, (case, number)
            assert (step[1], step[2], step[4]) == (number, number, 1), (case, number)
            assert step[3] != rate, "the rate is a function of the step, moved or not"
            rate = step[3]
        assert (last[1], last[2], last[4]) == (4, 0, 2), case
        assert last[0] != weights, case
        assert all(math.isfinite(weight) for weight in last[0]), case
