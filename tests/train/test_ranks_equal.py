"""Two ranks of B cells equal one rank of 2B: losses and gradients, through real DeepSpeed engines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.objective import toy
from tests.ranks import run_ranks

LOSSES = ("mgm", "cc", "ct", "ctm")


def one_step(
    rank: int, world: int, only: str | None, zero: int, options: dict[str, object], precision: str = "fp32"
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Global losses and averaged gradients of one step on this rank's share of the eight cells."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions

    weights = {f"w_{name}": float(only in (None, name)) for name in LOSSES}
    count = 8 // world
    train = TrainOptions(
        micro_batch=count, global_batch=8, num_workers=world, zero=zero, clip=0.0, precision=precision
    )  # type: ignore[arg-type]
    stage = toy.stage(2, **options, **weights)
    if stage.text_locked:
        stage.pool_table()
    engine = build_engine(stage, train, lr=1e-3, steps=10, device=torch.device("cpu"))
    shares = engine(toy.batch(rank * count, count), 3)
    engine.backward(shares["total"])
    gradients = {
        name: safe_get_full_grad(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    values = torch.stack([shares[name].detach() for name in LOSSES])
    dist.all_reduce(values)
    return dict(zip(LOSSES, values.tolist(), strict=True)), gradients


PAPER = {"preset": "paper", "mgm_view": "shared"}


@pytest.mark.parametrize(("only", "options"), [*((loss, {}) for loss in LOSSES), (None, {}), (None, PAPER)])
def test_two_ranks_equal_one(only: str | None, options: dict[str, object]) -> None:
    [(losses, gradients)] = run_ranks(one_step, 1, 1, only, 2, options)
    (losses_of_two, gradients_of_two), second = run_ranks(one_step, 2, 2, only, 2, options)
    assert losses_of_two == second[0]
    assert losses == pytest.approx(losses_of_two, rel=1e-5, abs=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        # To 1e-5 of the tensor's own scale; what is zero but for rounding (a key's bias) is below 1e-6.
        scale = max(1e-5 * float(gradient.abs().max()), 1e-6)
        for of_two in (gradients_of_two, second[1]):
            torch.testing.assert_close(of_two[name], gradient, rtol=0, atol=scale, msg=name)


@pytest.mark.parametrize("zero", [1, 3])
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
