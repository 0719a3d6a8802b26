"""Rows of all ranks, with the gradient through the gather.

Every lane hands over exactly B rows, so the gathered tensor is a plain concatenation in rank order.
In the backward each rank's rows receive the sum over ranks of what was asked of them; a gather
without gradient would be wrong, not merely noisy (0.5 instead of 1.0 of the gradient at two ranks,
and in another direction). Without a process group the world is one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def world() -> tuple[int, int]:
    """(rank, world size)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """All-gather forward, sum over ranks of one's own rows backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_B: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_B) for _ in range(world()[1])]
        dist.all_gather(parts, rows_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_G: Tensor) -> Tensor:  # type: ignore[override]
        rank, ranks = world()
        grad_G = grad_G.clone(memory_format=torch.contiguous_format)
        # A sum of all rows, of which a rank keeps its own: gloo has no reduce-scatter of tensors.
        dist.all_reduce(grad_G)
        return grad_G.chunk(ranks)[rank]


def gather_rows(rows_B: Tensor) -> Tensor:
    """[B, ...] of every rank -> [W * B, ...], in rank order; differentiable for floating types."""
    if world()[1] == 1:
        return rows_B
    return _Gather.apply(rows_B)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks, without gradient."""
    total = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total
