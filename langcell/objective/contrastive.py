"""C-C and C-T: InfoNCE of local rows against the columns of all lanes (paper, section 3.2).

A rank computes the logits of its own rows, never the G x G matrix, and by option some rows at a time.
Cells share texts: in C-T a column is a *cell's* text, so multiplicity counts, and the target is uniform
over all columns of the same text. Both functions return sums over the local rows; the caller divides by
the global count.

Shape suffixes: R local rows, G columns of all lanes, Z width of the joint space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from langcell.objective.options import TAU_RANGE


class Temperature(nn.Module):
    """tau, fixed or learnt in log space; a learnt one is clamped where it is used.

    An in-place clamp would not last: ZeRO keeps its own float32 copy of every parameter. A fixed one is
    no buffer, since the engine would round it to bf16.
    """

    def __init__(self, tau: float, learnt: bool) -> None:
        super().__init__()
        self.fixed = tau
        # Shape (1,): ZeRO cannot partition a scalar.
        self.log_tau_1 = nn.Parameter(torch.full((1,), math.log(tau))) if learnt else None

    def forward(self, device: torch.device) -> Tensor:
        """tau as a float32 tensor of shape (1,)."""
        if self.log_tau_1 is None:
            return torch.full((1,), self.fixed, device=device)
        low, high = (math.log(bound) for bound in TAU_RANGE)
        log_tau_1 = self.log_tau_1.float()
        # In value alone: with the clamp's own gradient, zero outside, one step too far would be the last.
        return (log_tau_1 + (log_tau_1.clamp(low, high) - log_tau_1).detach()).exp()


def cell_cell(first_RZ: Tensor, second_GZ: Tensor, row_R: Tensor, tau: Tensor) -> Tensor:
    """Sum over rows of -log softmax at the cell's own second view; every other cell is a negative.

    row_R: int64, index of each local row among the G columns.
    """
    logits_RG = first_RZ @ second_GZ.T / tau
    return nn.functional.cross_entropy(logits_RG, row_R, reduction="sum")


def cell_text(
    rows_RZ: Tensor, columns_GZ: Tensor, positive_RG: Tensor, excluded_RG: Tensor, tau: Tensor
) -> Tensor:
    """Sum over rows of the cross-entropy to a target uniform over the positive columns.

    excluded_RG: columns left out of the denominator; a positive is never excluded.
    """
    logits_RG = rows_RZ @ columns_GZ.T / tau
    log_z_R = logits_RG.masked_fill(excluded_RG, -torch.inf).logsumexp(dim=1)
    positive = positive_RG.to(logits_RG.dtype)
    mean_positive_R = (logits_RG * positive).sum(1) / positive.sum(1)
    return (log_z_R - mean_positive_R).sum()
