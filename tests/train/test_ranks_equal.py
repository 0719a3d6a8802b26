"""Ranks and lanes equal one big batch: losses and gradients, through real DeepSpeed engines.

The fast set holds two ranks, six lanes of one rank, and two ranks of three lanes; the slow one the rest.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from langcell.bench.ranks import run_ranks
from tests.objective import toy

LOSSES = ("mgm", "cc", "ct", "ctm")
CELLS = 12
SLOW = pytest.mark.slow

Found = tuple[dict[str, float], dict[str, Tensor]]


def assert_equal(one: Found, other: Found) -> None:
    """Losses to 1e-5; gradients to 1e-5 of the tensor's own scale (what is zero but for rounding, a key's
    bias, is below 1e-6)."""
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = max(1e-5 * float(gradient.abs().max()), 1e-6)
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=scale, msg=name)


def one_step(
    rank: int,
    world: int,
    only: str | None,
    zero: int,
    options: dict[str, object],
    precision: str = "fp32",
    lanes: int | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Global losses and averaged gradients of one step on this rank's share of the twelve cells.

    lanes: micro-batches that they are cut into (default: one a rank).
    """
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from langcell.objective.lanes import Lanes
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions
    from langcell.train.step import run_step

    here = Lanes.here(lanes)
    count = CELLS // here.total
    train = TrainOptions(
        micro_batch=count, global_batch=CELLS, num_workers=world, zero=zero, clip=0.0, precision=precision
    )  # type: ignore[arg-type]
    weights = {f"w_{name}": float(only in (None, name)) for name in LOSSES}
    stage = toy.stage(2, **options, **weights)
    if stage.text_locked:
        stage.pool_table()
    engine = build_engine(stage, train, lr=1e-3, steps=10, device=torch.device("cpu"), lanes=here.each)
    gradients = {}

    def look() -> None:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                gradients[name] = safe_get_full_grad(parameter).clone()

    step, engine.step = engine.step, look  # before the gradients are used up
    if here.each > 1:
        taken = []

        def last() -> None:
            taken.append(1)
            if len(taken) == here.each:
                look()
            step()

        engine.step = last
    batches = [toy.batch(lane * count, count) for lane in here.owned]
    shares = run_step(engine, here, batches, 3)
    values = torch.stack([shares[name] for name in LOSSES])
    dist.all_reduce(values)
    return dict(zip(LOSSES, values.tolist(), strict=True)), gradients


PAPER = {"preset": "paper", "mgm_view": "shared"}


@pytest.mark.parametrize(
    ("only", "options"),
    [
        *(pytest.param(loss, {}, marks=SLOW) for loss in LOSSES),
        (None, {}),
        pytest.param(None, PAPER, marks=SLOW),
    ],
)
def test_two_ranks_equal_one(only: str | None, options: dict[str, object]) -> None:
    [one] = run_ranks(one_step, 1, 1, only, 2, options)
    of_two, second = run_ranks(one_step, 2, 2, only, 2, options)
    assert of_two[0] == second[0]
    assert any(gradient.abs().max() > 1e-3 for gradient in one[1].values())
    assert_equal(one, of_two)
    assert_equal(one, second)


BALANCED = {"ctm_mining": "balanced", "tau_learnt": True, "ctm_cells": 2}


@pytest.mark.parametrize(
    ("world", "lanes", "options"),
    [
        pytest.param(3, 3, {}, marks=SLOW),
        (1, 6, {}),  # six lanes of one rank
        pytest.param(2, 6, {"tau_learnt": True, "logit_rows": 2, "mgm_chunk": 3}, marks=SLOW),
        pytest.param(2, 3, {}, marks=SLOW),  # one rank is short of a lane
        pytest.param(2, 3, PAPER, marks=SLOW),
        pytest.param(2, 3, {"text_train": "projection"}, marks=SLOW),
        pytest.param(2, 6, {"ctm_mining": "balanced", "tau_learnt": True}, marks=SLOW),
    ],
)
def test_ranks_and_lanes_equal_one_big_batch(world: int, lanes: int, options: dict[str, object]) -> None:
    plain = {name: value for name, value in options.items() if name not in ("logit_rows", "mgm_chunk")}
    [one] = run_ranks(one_step, 1, 1, None, 2, plain)
    for found in run_ranks(one_step, world, world, None, 2, options, "fp32", lanes):
        assert_equal(one, found)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cc", "ct", "ctm"])
def test_each_loss_of_several_lanes_equals_one_big_batch(loss: str) -> None:
    [one] = run_ranks(one_step, 1, 1, loss, 2, {})
    [found] = run_ranks(one_step, 1, 1, loss, 2, {}, "fp32", 3)
    assert_equal(one, found)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=SLOW), 3])
def test_lanes_at_every_zero_stage(zero: int) -> None:
    [one] = run_ranks(one_step, 1, 1, None, 2, BALANCED, "fp32", 3)
    for found in run_ranks(one_step, 2, 2, None, zero, BALANCED, "fp32", 3):
        assert_equal(one, found)


@pytest.mark.slow
def test_dropout_belongs_to_the_lane_not_to_the_rank() -> None:
    """Six lanes with dropout on one, two, three and six ranks: a pass that is repeated draws what it drew."""
    options = {"dropout": 0.3}
    [one] = run_ranks(one_step, 1, 1, None, 2, options, "fp32", 6)
    for world in (2, 3):
        for found in run_ranks(one_step, world, world, None, 2, options, "fp32", 6):
            assert_equal(one, found)
    every = run_ranks(one_step, 6, 6, None, 2, options, "fp32", 6)  # one lane a rank: no pass is repeated
    assert_equal(one, every[0])


@pytest.mark.parametrize("zero", [pytest.param(1, marks=SLOW), 3])
def test_every_zero_stage_has_the_same_gradients(zero: int) -> None:
    (losses, gradients), _ = run_ranks(one_step, 2, 2, None, 2, {})
    (others, other_gradients), _ = run_ranks(one_step, 2, 2, None, zero, {})
    assert losses == pytest.approx(others, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("text_train", ["all", "projection"])
def test_bf16_is_fp32_to_its_own_precision(text_train: str) -> None:
    """bf16 has 8 bits: losses within 3%, gradients in the same direction."""
    options = {"text_train": text_train, "tau": 0.2}
    [(losses, gradients)] = run_ranks(one_step, 1, 1, None, 2, options)
    [(rough, rough_gradients)] = run_ranks(one_step, 1, 1, None, 2, options, "bf16")
    assert losses == pytest.approx(rough, rel=0.03)
    flat, rough_flat = (
        torch.cat([g[name].flatten().float() for name in sorted(gradients)])
        for g in (gradients, rough_gradients)
    )
    assert float(torch.cosine_similarity(flat, rough_flat, dim=0)) > 0.98
