"""Rows of all ranks, with the gradient through the gather.

Every rank hands over equally many rows, so the gathered tensor is a plain concatenation in rank order.
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
    def forward(ctx: FunctionCtx, rows_R: Tensor) -> Tensor:
        gathered = rows_R.new_empty(world()[1] * len(rows_R), *rows_R.shape[1:])
        dist.all_gather(list(gathered.chunk(world()[1])), rows_R.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: FunctionCtx, grad_G: Tensor) -> Tensor:  # type: ignore[override]
        grad_R = grad_G.new_empty(len(grad_G) // world()[1], *grad_G.shape[1:])
        dist.reduce_scatter(grad_R, list(grad_G.contiguous().chunk(world()[1])))
        return grad_R


def gather_rows(rows_R: Tensor) -> Tensor:
    """[R, ...] of every rank -> [W * R, ...], in rank order; differentiable for floating types."""
    if world()[1] == 1:
        return rows_R
    return _Gather.apply(rows_R)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks, without gradient."""
    total = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total
