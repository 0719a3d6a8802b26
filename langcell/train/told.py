"""What ranks tell each other at every step, in one small collective.

Losses, counts, the slowest wait for data; and what they must agree on: whether to stop, whether a checkpoint
is due and whether a rank still writes the last one. So no decision of the loop needs a collective of its own,
and every rank takes the same one after the same step.

Shape suffixes: L losses, N counts of work, W ranks, F flags.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from langcell.model.flops import Work
from langcell.objective.lanes import Lanes

FLAGS = ("stop", "save", "due", "busy", "give_up", "ask")
"""Stop on notice; save at once, on notice; a checkpoint is due; a rank still writes the last one; the run
cannot be saved, or is not ours any more; ask Ray whether a node is about to be taken away."""


@dataclass(frozen=True)
class Told:
    """Of all ranks: losses, tokens and work of a step, the longest time (s) that one of them waited for data
    (the others wait for that rank in their next collective), and the flags that a rank has raised."""

    losses: dict[str, float]
    tokens: float
    work: Work
    wait: float
    flags: frozenset[str]


def tell(
    shares: dict[str, Tensor],
    names: tuple[str, ...],
    lanes: Lanes,
    *,
    tokens: float = 0.0,
    wait: float = 0.0,
    flags: frozenset[str] = frozenset(),
) -> Told:
    """shares: this rank's of the losses `names`, and `work`; flags: of `FLAGS`. A collective."""
    losses_L = torch.stack([shares[name].float() for name in names])
    waits_W = losses_L.new_zeros(lanes.ranks)
    waits_W[lanes.rank] = wait
    flags_F = losses_L.new_tensor([float(flag in flags) for flag in FLAGS])
    parts = [losses_L, losses_L.new_tensor([tokens]), shares["work"].float(), waits_W, flags_F]
    values = torch.cat(parts)
    dist.all_reduce(values)
    losses, tokens_1, work_N, waits, raised_F = values.split([len(part) for part in parts])
    return Told(
        dict(zip(names, losses.tolist(), strict=True)),
        tokens_1.item(),
        Work(*work_N.tolist()),
        max(waits.tolist()),
        frozenset(flag for flag, raised in zip(FLAGS, raised_F.tolist(), strict=True) if raised),
    )
