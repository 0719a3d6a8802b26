"""What needs the rows of all lanes: C-C, C-T and the pairs of CTM.

Only rows of the joint space and ids cross ranks: 3 x Z floats and 5 integers a cell, 3 kB at Z = 256, and
four integers (balanced: two and a float) a cell that starts pairs. Each rank computes the logits of its own
rows against all columns, B x G and never G x G, and draws the hard text of its own cells and the hard cell
of its own texts; the draws are gathered, so that every rank knows whose cell takes part in which pair. (Were
every rank to repeat all draws, each would pay G x G, and two whose products differ in the last bit could
disagree.)

Shape suffixes: R rows of this rank's lanes, G rows of all lanes, Z joint space, N rows of this rank that
start pairs, M those of all lanes, P pairs, K lanes of this rank, n rows of one that start pairs, B its
cells, I ids of a cell, C cell-type terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from langcell.batch import MicroBatch
from langcell.objective.contrastive import cell_cell, cell_text
from langcell.objective.lanes import Lanes
from langcell.objective.matching import Pairs
from langcell.objective.negatives import (
    HARD_CELL,
    HARD_TEXT,
    SECOND_TEXT,
    Relations,
    Rows,
    draw_hard,
    initiators,
    relations,
)
from langcell.objective.options import ObjectiveOptions


@dataclass(frozen=True)
class Views:
    """What a rank's lanes show of their cells, laid end to end: first_RZ, second_RZ: z_c of both passes;
    text_RZ: z_t of each cell's text (stage 2); tau_1: the temperature. All float32."""

    first_RZ: Tensor
    second_RZ: Tensor
    text_RZ: Tensor | None
    tau_1: Tensor


@dataclass(frozen=True)
class Compared:
    """shares: this rank's share of the means of `cc` and (stage 2) `ct`, differentiable; pairs: those of
    all lanes that this rank may have a cell of (stage 2), cells as rows of all lanes; empty: draws of all
    lanes that found no partner (float32 scalar); drawn_N2: of this rank's cells that start pairs, joinid and
    the row of the hard text, -1 where there is none (int64, stage 2)."""

    shares: dict[str, Tensor]
    pairs: Pairs | None
    empty: Tensor
    drawn_N2: Tensor | None = None

    @property
    def told(self) -> dict[str, Tensor]:
        """The shares, `empty` and (stage 2) `drawn`, by name."""
        drawn = {} if self.drawn_N2 is None else {"drawn": self.drawn_N2}
        return {**self.shares, "empty": self.empty, **drawn}


def compare(
    views: Views,
    batches: list[MicroBatch],
    lanes: Lanes,
    options: ObjectiveOptions,
    related_CC: Tensor,
    *,
    seed: int,
    step: int,
) -> Compared:
    """Compare the rows of the owned lanes with those of all. batches: of the owned lanes, in order."""
    device = views.first_RZ.device
    row_R = lanes.rows(len(batches[0]), device)
    every = options.logit_rows or len(row_R)

    def summed(loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over the local rows of `loss(places)`, some rows at a time; their logits are not kept."""
        places = torch.arange(len(row_R), device=device).split(every)
        if len(places) == 1:
            return loss(places[0])
        return torch.stack([checkpoint(loss, place, use_reentrant=False) for place in places]).sum()

    second_GZ, tau = lanes.gather(views.second_RZ), views.tau_1
    n_rows = len(second_GZ)
    cc = summed(lambda place: cell_cell(views.first_RZ[place], second_GZ, row_R[place], tau))
    shares = {"cc": cc / n_rows}
    if views.text_RZ is None:
        return Compared(shares, None, tau.new_zeros(()))

    text_RZ, rows = views.text_RZ, _gather_ids(batches, lanes)
    cells_GZ, texts_GZ = lanes.gather(views.first_RZ), lanes.gather(text_RZ)
    paper = options.preset == "paper"

    def both_ways(place: Tensor) -> Tensor:
        texts = relations(rows, row_R[place], related_CC, paper=paper, of="cells")
        cells = relations(rows, row_R[place], related_CC, paper=paper, of="texts")
        to_text = cell_text(views.first_RZ[place], texts_GZ, texts.positive_RG, texts.excluded_RG, tau)
        to_cell = cell_text(text_RZ[place], cells_GZ, cells.positive_RG, cells.excluded_RG, tau)
        return (to_text + to_cell) / 2

    shares["ct"] = summed(both_ways) / n_rows
    with torch.no_grad():
        mining = _Mining(rows, related_CC, paper, tau, seed, step, every)
        pairs = _mine(mining, views.first_RZ, text_RZ, cells_GZ, texts_GZ, row_R, batches, lanes, options)
    return Compared(shares, *pairs)


@dataclass(frozen=True)
class _Mining:
    """What all draws of a step have in common."""

    rows: Rows
    related_CC: Tensor
    paper: bool
    tau_1: Tensor
    seed: int
    step: int
    every: int

    def scores(self, from_NZ: Tensor, to_GZ: Tensor) -> Tensor:
        return from_NZ @ to_GZ.T / self.tau_1

    def relations(self, row_N: Tensor, of: str) -> Relations:
        return relations(self.rows, row_N, self.related_CC, paper=self.paper, of=of)  # type: ignore[arg-type]

    def draw(
        self,
        from_NZ: Tensor,
        to_GZ: Tensor,
        row_N: Tensor,
        of: str,
        purpose: int,
        offset_G: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A hard column of each row, and whether there is one; `every` rows at a time."""
        drawn = []
        for from_Z, row in zip(from_NZ.split(self.every), row_N.split(self.every), strict=True):
            scores = self.scores(from_Z, to_GZ)
            if offset_G is not None:
                scores = scores - offset_G
            admissible = self.relations(row, of).admissible_RG
            drawn.append(
                draw_hard(scores, admissible, self.rows, row, purpose=purpose, seed=self.seed, step=self.step)
            )
        column, exists = zip(*drawn, strict=True)
        return torch.cat(column), torch.cat(exists)

    def log_mass(self, text_RZ: Tensor, cells_GZ: Tensor, row_R: Tensor) -> Tensor:
        """L_j of the texts of `row_R`: logsumexp of their scores over the admissible cells [R]; 0 without."""
        mass = []
        for text_Z, row in zip(text_RZ.split(self.every), row_R.split(self.every), strict=True):
            admissible = self.relations(row, "texts").admissible_RG
            own = self.scores(text_Z, cells_GZ).masked_fill(~admissible, -torch.inf).logsumexp(dim=1)
            mass.append(own.masked_fill(~admissible.any(dim=1), 0.0))
        return torch.cat(mass)


def _mine(
    mining: _Mining,
    first_RZ: Tensor,
    text_RZ: Tensor,
    cells_GZ: Tensor,
    texts_GZ: Tensor,
    row_R: Tensor,
    batches: list[MicroBatch],
    lanes: Lanes,
    options: ObjectiveOptions,
) -> tuple[Pairs, Tensor, Tensor]:
    """The pairs, how many draws of all lanes found no partner, and the hard texts of this rank's cells.

    Three pairs per initiating row i: (i, its text), (i, a hard text), and (a hard cell, its text), or
    (i, a second hard text) where mining is balanced. A draw without a partner is (i, its text) of weight 0.
    """
    joinid_KB = torch.stack([batch.soma_joinid_B for batch in batches])
    place_Kn = initiators(joinid_KB, options.ctm_cells, seed=mining.seed, step=mining.step)
    place_N = (
        place_Kn + torch.arange(len(batches), device=row_R.device)[:, None] * len(batches[0])
    ).flatten()
    row_N = row_R[place_N]

    text_N, text_exists_N = mining.draw(first_RZ[place_N], texts_GZ, row_N, "cells", HARD_TEXT)
    if options.ctm_mining == "balanced":
        mass_G = lanes.gather(mining.log_mass(text_RZ, cells_GZ, row_R))
        other_N, exists_N = mining.draw(first_RZ[place_N], texts_GZ, row_N, "cells", SECOND_TEXT, mass_G)
        third = (row_N, other_N, exists_N)
        drawn_N2 = torch.stack([text_exists_N, exists_N], dim=1).long()
        exists_M = lanes.gather(drawn_N2)
    else:
        hard_N, exists_N = mining.draw(text_RZ[place_N], cells_GZ, row_N, "texts", HARD_CELL)
        drawn_M4 = lanes.gather(torch.stack([row_N, hard_N, text_exists_N.long(), exists_N.long()], dim=1))
        third = (drawn_M4[:, 1], drawn_M4[:, 0], drawn_M4[:, 3].bool())
        exists_M = drawn_M4[:, 2:]

    n = len(row_N)
    cell_P = torch.cat([row_N, row_N, third[0]])
    text_P = torch.cat([row_N, text_N, third[1]])
    exists_P = torch.cat([torch.ones_like(text_exists_N), text_exists_N, third[2]])
    weight = 1 / (len(exists_M) + exists_M.sum().float())
    pairs = Pairs(
        cell_P,
        mining.rows.text_row_G[text_P],
        torch.arange(len(cell_P), device=cell_P.device) < n,
        exists_P * weight,
    )
    hard_N = mining.rows.text_row_G[text_N].masked_fill(~text_exists_N.bool(), -1)
    drawn_N2 = torch.stack([mining.rows.soma_joinid_G[row_N], hard_N], dim=1)
    return pairs, (exists_M == 0).sum().float(), drawn_N2


def _gather_ids(batches: list[MicroBatch], lanes: Lanes) -> Rows:
    ids_RI = torch.cat(
        [
            torch.stack([b.soma_joinid_B, b.text_id_B, b.term_B, b.text_row_B, b.short_B.long()], dim=1)
            for b in batches
        ]
    )
    joinid_G, text_id_G, term_G, text_row_G, short_G = lanes.gather(ids_RI).unbind(dim=1)
    return Rows(joinid_G, text_id_G, term_G, text_row_G, short_G.bool())
