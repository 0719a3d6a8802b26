"""C-C and C-T: InfoNCE of local rows against the columns of all ranks (paper, section 3.2).

A rank computes B rows of the logits, never the G x G matrix. Cells share texts: in C-T a column is
a *cell's* text, so multiplicity counts, and the target is uniform over all columns of the same
text. Both functions return sums over the local rows; the caller divides by the global count.

Shape suffixes: B local rows, G columns of all ranks, Z width of the joint space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """tau, fixed or learnt in log space; a learnt one is clamped where it is used.

    An in-place clamp would not last: ZeRO keeps its own float32 copy of every parameter. A fixed one is
    no buffer, since the engine would round it to bf16.
    """

    RANGE = (0.01, 0.5)  # CLIP's own floor; above 0.5 cosines no longer separate anything

    def __init__(self, tau: float, learnt: bool) -> None:
        super().__init__()
        self.fixed = tau
        # Shape (1,): ZeRO cannot partition a scalar.
        self.log_tau_1 = nn.Parameter(torch.full((1,), math.log(tau))) if learnt else None

    def forward(self, device: torch.device) -> Tensor:
        """tau as a float32 tensor of shape (1,)."""
        if self.log_tau_1 is None:
            return torch.full((1,), self.fixed, device=device)
        low, high = self.RANGE
        return self.log_tau_1.float().exp().clamp(low, high)


def cell_cell(first_BZ: Tensor, second_GZ: Tensor, row_B: Tensor, tau: Tensor) -> Tensor:
    """Sum over rows of -log softmax at the cell's own second view; every other cell is a negative.

    row_B: int64, index of each local row among the G columns.
    """
    logits_BG = first_BZ @ second_GZ.T / tau
    return nn.functional.cross_entropy(logits_BG, row_B, reduction="sum")


def cell_text(
    rows_BZ: Tensor, columns_GZ: Tensor, positive_BG: Tensor, excluded_BG: Tensor, tau: Tensor
) -> Tensor:
    """Sum over rows of the cross-entropy to a target uniform over the positive columns.

    excluded_BG: columns left out of the denominator; a positive is never excluded.
    """
    logits_BG = rows_BZ @ columns_GZ.T / tau
    log_z_B = logits_BG.masked_fill(excluded_BG, -torch.inf).logsumexp(dim=1)
    positive = positive_BG.to(logits_BG.dtype)
    mean_positive_B = (logits_BG * positive).sum(1) / positive.sum(1)
    return (log_z_B - mean_positive_B).sum()
