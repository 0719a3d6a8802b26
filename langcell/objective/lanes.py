"""Lanes: the V micro-batches of a step, whatever the number of ranks that run them.

Rank r of W owns the lanes v = r mod W, and all ranks run the same number of lanes, ceil(V / W): one that is
short of a lane repeats its first with weight 0, so that no rank makes fewer calls of a module than another
(ZeRO-3 would wait for it for ever). What is gathered stands in the order of lanes, so nothing that is
computed from it depends on W.

Shape suffixes: B rows of a lane, R rows of the lanes that a rank owns, G rows of all lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langcell.objective.gather import gather_rows, world


@dataclass(frozen=True)
class Lanes:
    """total: V, at least the number of ranks; rank, ranks: this one, of how many."""

    total: int
    rank: int
    ranks: int

    @classmethod
    def here(cls, total: int | None = None) -> Lanes:
        """Of this process. total: V (default: one lane a rank)."""
        rank, ranks = world()
        return cls(total or ranks, rank, ranks)

    @property
    def each(self) -> int:
        """Lanes that a rank runs."""
        return -(-self.total // self.ranks)

    @property
    def owned(self) -> list[int]:
        """This rank's lanes, ascending."""
        return list(range(self.rank, self.total, self.ranks))

    @property
    def runs(self) -> list[tuple[int, float]]:
        """What this rank runs, in order: places in `owned`, and weights; a lane that is run again has 0."""
        again = self.each - len(self.owned)
        return [(place, 1.0) for place in range(len(self.owned))] + [(0, 0.0)] * again

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Where the rows of the owned lanes stand among those of all (int64 [R]). count: rows of a lane."""
        first_K1 = torch.tensor(self.owned, device=device)[:, None] * count
        return (first_K1 + torch.arange(count, device=device)).flatten()

    def gather(self, rows_R: Tensor) -> Tensor:
        """The rows [R, ...] of the owned lanes -> those of all lanes [G, ...], in the order of lanes.

        Differentiable for floating types: each rank's rows receive what all ranks ask of them.
        """
        count = len(rows_R) // len(self.owned)
        if len(self.owned) < self.each:
            rows_R = torch.cat([rows_R, rows_R[:count]])
        gathered = gather_rows(rows_R).unflatten(0, (self.ranks, self.each, count))
        return gathered.transpose(0, 1).flatten(0, 2)[: self.total * count]
