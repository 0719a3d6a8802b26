"""Real engines on two ranks against one plain process with PyTorch's AdamW, and against each other.

All runs of a rank share one process group: a group costs two seconds, a run of the toy model 0.2.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from langcell.bench.ranks import run_ranks
from tests.objective import toy

STEPS = 2
LR = 1e-3
SCHEDULE = 10  # steps of the stage: the rate rises at the first, then falls
CELLS = 8
STAGES = (1, 2, 3)
Trace = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]
"""Global loss of each step; gradients of the first step; weights after the last."""


def options(**changed: Any) -> Any:
    from langcell.train.options import TrainOptions

    return TrainOptions(micro_batch=CELLS // 2, global_batch=CELLS, text_lr=LR, clip=0.5, **changed)


def stage(dropout: float = 0.0, number: int = 2) -> Any:
    return toy.stage(number, dropout=dropout, tau_learnt=True, tau=0.2)


def trained(rank: int, dropout: float = 0.0, **changed: Any) -> Trace:
    """Some steps of an engine on this rank's half of the cells."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from langcell.train.checkpoint import whole_weights
    from langcell.train.engine import build_engine

    engine = build_engine(
        stage(dropout), options(**changed), lr=LR, steps=SCHEDULE, device=torch.device("cpu")
    )
    count = CELLS // dist.get_world_size()
    batch = toy.batch(rank * count, count)
    losses, gradients = [], {}
    for step in range(STEPS):
        torch.manual_seed(1000 * step + rank)
        share = engine(batch, step)["total"]
        engine.backward(share)
        if step == 0:
            gradients = {
                name: safe_get_full_grad(parameter).clone()
                for name, parameter in engine.module.named_parameters()
            }
        engine.step()
        loss = share.detach() / dist.get_world_size()
        dist.all_reduce(loss)
        losses.append(float(loss))
    weights = whole_weights(engine)
    engine.destroy()
    return losses, gradients, weights


def trained_by_lanes(rank: int, number: int = 2, dropout: float = 0.0, **changed: Any) -> Trace:
    """The same, of one of the two stages, on this rank's two of four lanes; without gradients."""
    import torch.distributed as dist

    from langcell.objective.lanes import Lanes
    from langcell.objective.stages import LOSSES
    from langcell.train.checkpoint import whole_weights
    from langcell.train.engine import build_engine
    from langcell.train.step import run_step

    lanes = Lanes.here(4)
    engine = build_engine(
        stage(dropout, number),
        options(**changed),
        lr=LR,
        steps=SCHEDULE,
        device=torch.device("cpu"),
        lanes=lanes.each,
    )
    count, losses = CELLS // lanes.total, []
    for step in range(STEPS):
        shares = run_step(engine, lanes, [toy.batch(lane * count, count) for lane in lanes.owned], step)
        loss = torch.stack([shares[name] for name in LOSSES[number]]).sum()
        dist.all_reduce(loss)
        losses.append(float(loss))
    weights = whole_weights(engine)
    engine.destroy()
    return losses, {}, weights


def plain(number: int = 2) -> Trace:
    """The same steps of one process without DeepSpeed."""
    from transformers import get_cosine_schedule_with_warmup

    from langcell.train.engine import parameter_groups

    module, train = stage(number=number), options()
    optimizer = torch.optim.AdamW(parameter_groups(module, LR, train.text_lr, train.weight_decay))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, SCHEDULE + 1, last_epoch=0)
    losses, gradients = [], {}
    for step in range(STEPS):
        total = module(toy.batch(0, CELLS), step)["total"]
        total.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(module.parameters(), train.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses, gradients, {name: p.detach().clone() for name, p in module.named_parameters()}


def every_run(rank: int) -> dict[tuple[str, int], Trace]:
    """By variant and ZeRO stage."""
    runs = {("dropout", 2): trained(rank, 0.1, zero=2)}
    for zero in STAGES:
        runs["plain", zero] = trained(rank, zero=zero)
        runs["small", zero] = trained(rank, 0.1, zero=zero, offload=True, activation_checkpointing=True)
        runs["lanes", zero] = trained_by_lanes(rank, zero=zero)
    runs["lanes of stage 1", 2] = trained_by_lanes(rank, number=1)
    runs["lanes, dropout", 2] = trained_by_lanes(rank, dropout=0.1)
    small = {"offload": True, "activation_checkpointing": True}
    runs["lanes, small", 2] = trained_by_lanes(rank, dropout=0.1, **small)
    return runs


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, int], Trace]:
    return run_ranks(every_run, 2)[0]


def assert_equal(ours: Trace, reference: Trace, rtol: float, steps_share: float) -> None:
    """Losses and gradients to `rtol`; weights to that share of what a step may move them (the rate).

    Where a gradient is nothing but rounding (a key's bias; genes beyond a softmax's reach) Adam makes
    whole steps of it, in any direction: such weights are left out.
    """
    losses, gradients, weights = ours
    assert losses == pytest.approx(reference[0], rel=rtol)
    assert reference[1].keys() <= weights.keys()
    for name, gradient in reference[1].items():
        if gradients:
            atol = max(rtol * float(gradient.abs().max()), 1e-6)
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)
        told = gradient.abs() > 1e-4
        moved = (weights[name] - reference[2][name]).abs()[told]
        assert moved.numel() == 0 or float(moved.max()) < steps_share * LR, name


@pytest.mark.parametrize("zero", STAGES)
def test_steps_equal_a_plain_adamw(runs: dict[tuple[str, int], Trace], zero: int) -> None:
    """Clipping, schedule, decay and a learnt temperature included."""
    reference = plain()
    assert reference[0][0] != pytest.approx(reference[0][-1], rel=1e-3)  # something is learnt
    assert_equal(runs["plain", zero], reference, 1e-5, 0.02)


@pytest.mark.parametrize(("run", "zero"), [*(("lanes", zero) for zero in STAGES), ("lanes of stage 1", 2)])
def test_steps_of_several_lanes_equal_a_plain_adamw(
    runs: dict[tuple[str, int], Trace], run: str, zero: int
) -> None:
    """Accumulated, clipped once, and nothing left of it in the next step."""
    assert_equal(runs[run, zero], plain(1 if "stage 1" in run else 2), 1e-5, 0.02)


def test_lanes_that_are_computed_again_draw_the_same_dropout(runs: dict[tuple[str, int], Trace]) -> None:
    small, reference = runs["lanes, small", 2], runs["lanes, dropout", 2]
    assert reference[0] != pytest.approx(runs["lanes", 2][0], rel=1e-3)
    assert small[0] == pytest.approx(reference[0], rel=1e-5)
    for name, weight in reference[2].items():
        off = (small[2][name] - weight).abs()
        assert float(off.median()) < 0.02 * LR, name  # but for weights that rounding alone moves


@pytest.mark.parametrize("zero", STAGES)
def test_offload_and_recomputation_change_no_number(runs: dict[tuple[str, int], Trace], zero: int) -> None:
    """With the same dropout when a layer is computed again."""
    assert runs["dropout", 2][0] != runs["plain", 2][0]
    assert_equal(runs["small", zero], runs["dropout", 2], 1e-5, 0.02)


def compiled_run(rank: int) -> dict[int, tuple[Trace, Trace]]:
    """By ZeRO stage: with compiled layers, and without."""
    return {
        zero: (trained(rank, 0.1, zero=zero, compile=True), trained(rank, 0.1, zero=zero)) for zero in (2, 3)
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_change_no_number() -> None:
    """Dropout included."""
    for ours, reference in run_ranks(compiled_run, 1)[0].values():
        assert_equal(ours, reference, 1e-5, 0.02)


def test_checkpointing_computes_every_layer_twice() -> None:
    calls = []
    module = stage(0.1)
    module.model.checkpoint_layers()
    for bert in (module.model.cell_bert, module.model.text_bert):
        for layer in bert.encoder.layer:
            layer.output.dense.register_forward_hook(lambda *_: calls.append(1))
    total = module(toy.batch(), 0)["total"]
    forward = len(calls)
    total.backward()
    assert len(calls) == 2 * forward


class Sum(nn.Module):
    """A loss whose gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


Accumulated = dict[tuple[str, int], tuple[list[float], float, list[float]]]


def accumulated(rank: int) -> Accumulated:
    """The mean gradient that Adam saw, its norm, and the weights after a step of 16 lanes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    from langcell.train.checkpoint import whole_weights
    from langcell.train.engine import build_engine

    seen = {}
    for precision in ("fp32", "bf16"):
        for zero in STAGES:
            train = options(zero=zero, precision=precision)
            engine = build_engine(Sum(), train, lr=LR, steps=10, device=torch.device("cpu"), lanes=16)
            for lane in range(16):
                value = (1.0 if lane == 0 else 2**-9) * (1 + 2 * rank)
                engine.backward(engine(torch.full((4,), value, dtype=engine.module.weight.dtype)))
                engine.step()
            first_moment = safe_get_full_optimizer_state(engine.module.weight, "exp_avg")
            norm = float(engine.get_global_grad_norm())
            weights = whole_weights(engine)["weight"].tolist()
            seen[precision, zero] = ((10 * first_moment).tolist(), norm, weights)
            engine.destroy()
    return seen


def test_lanes_are_averaged_in_float32() -> None:
    """2^-9 beside 1 would be lost in bf16's 8 bits, fifteen times (3%); ranks may exchange rounded sums."""
    mean = 2 * (1 + 15 * 2**-9) / 16
    for (precision, zero), (gradient, norm, weights) in run_ranks(accumulated, 2)[0].items():
        rounding = 1e-5 if precision == "fp32" else 2**-8
        assert gradient == pytest.approx([mean] * 4, rel=rounding), (precision, zero)
        assert norm == pytest.approx(2 * mean, rel=rounding), (precision, zero)
        assert weights == pytest.approx([-LR] * 4, rel=1e-3), (precision, zero)
