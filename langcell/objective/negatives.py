"""What may be a negative, and which hard ones are drawn.

Cells share texts, and a "T cell" text is true of a "CD8 T cell": neither is a negative. Two rows
(i, j) of the global batch are

- the same text: equal text_id;
- related: one cell-type term is an ontology ancestor of the other, or the terms are equal and the
  drawn text of j is a shortened variant (what told it from i's text is just what was left out).

The preset `paper` knows neither: only a row itself is no negative of itself. Hard negatives are
drawn over the global batch in proportion to exp S by the Gumbel-max rule, with noise from a hash of
(seed, step, joinids of the pair): every rank derives all draws by itself from gathered rows.

Shape suffixes: G rows of the global batch, Z joint space, N initiating rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langcell.objective import draws

HARD_TEXT, HARD_CELL, SUBSET = 11, 12, 13  # purposes of the draws


@dataclass(frozen=True)
class Rows:
    """Ids of all rows of the global batch (int64 [G]; `short_G` bool), in rank order."""

    soma_joinid_G: Tensor
    text_id_G: Tensor
    term_G: Tensor
    text_row_G: Tensor
    short_G: Tensor

    def __len__(self) -> int:
        return self.soma_joinid_G.numel()


@dataclass(frozen=True)
class Relations:
    """positive_GG[i, j]: text j is cell i's own; excluded_GG[i, j]: text j is no negative of cell i."""

    positive_GG: Tensor
    excluded_GG: Tensor

    @property
    def admissible_GG(self) -> Tensor:
        """Pairs (cell i, text j) that may be drawn as non-matches."""
        return ~(self.positive_GG | self.excluded_GG)


def relations(rows: Rows, related_CC: Tensor, paper: bool) -> Relations:
    """Which (cell i, text j) pairs are positives and which are left out of the denominators."""
    own_GG = torch.eye(len(rows), dtype=torch.bool, device=rows.text_id_G.device)
    if paper:
        return Relations(own_GG, torch.zeros_like(own_GG))
    positive_GG = rows.text_id_G[:, None] == rows.text_id_G[None, :]
    known_G = rows.term_G >= 0
    known_GG = known_G[:, None] & known_G[None, :]
    term_G = rows.term_G.clamp(min=0)
    related_GG = (
        related_CC[term_G[:, None], term_G[None, :]] if related_CC.numel() else torch.zeros_like(own_GG)
    )
    same_term_GG = term_G[:, None] == term_G[None, :]
    excluded_GG = known_GG & (related_GG | (same_term_GG & rows.short_G[None, :])) & ~positive_GG
    return Relations(positive_GG, excluded_GG)


@dataclass(frozen=True)
class Pairs:
    """(cell, text) pairs of the whole global batch as row indices [P]; match: bool; weight: float."""

    cell_P: Tensor
    text_P: Tensor
    match_P: Tensor
    weight_P: Tensor


def mine_pairs(
    logits_GG: Tensor,
    relation: Relations,
    soma_joinid_G: Tensor,
    initiator_N: Tensor,
    *,
    seed: int,
    step: int,
) -> Pairs:
    """Three pairs per initiating row i: (i, its text), (i, a hard text), (a hard cell, its text).

    logits_GG: S_ij = z_c(i) . z_t(j) / tau, detached. A draw without an admissible partner becomes
    (i, its own text) with weight 0.
    """
    a, b = soma_joinid_G[initiator_N][:, None], soma_joinid_G[None, :]
    admissible_GG = relation.admissible_GG

    def draw(purpose: int, scores_NG: Tensor, admissible_NG: Tensor) -> tuple[Tensor, Tensor]:
        noise_NG = draws.gumbel(draws.hashed(draws.key(seed, step, purpose), a, b))
        noisy_NG = (scores_NG.double() + noise_NG).masked_fill(~admissible_NG, -torch.inf)
        exists_N = admissible_NG.any(dim=1)
        return torch.where(exists_N, noisy_NG.argmax(dim=1), initiator_N), exists_N

    text_N, text_exists_N = draw(HARD_TEXT, logits_GG[initiator_N], admissible_GG[initiator_N])
    cell_N, cell_exists_N = draw(HARD_CELL, logits_GG.T[initiator_N], admissible_GG.T[initiator_N])
    n = initiator_N.numel()
    return Pairs(
        cell_P=torch.cat([initiator_N, initiator_N, cell_N]),
        text_P=torch.cat([initiator_N, text_N, initiator_N]),
        match_P=torch.arange(3 * n, device=initiator_N.device) < n,
        weight_P=torch.cat([torch.ones_like(text_exists_N), text_exists_N, cell_exists_N]).float(),
    )


def initiators(soma_joinid_G: Tensor, lanes: int, cells: int | None, *, seed: int, step: int) -> Tensor:
    """Rows that start pairs (int64, ascending): all, or a seeded choice of `cells` of each lane's B."""
    if cells is None or cells >= soma_joinid_G.numel() // lanes:
        return torch.arange(soma_joinid_G.numel(), device=soma_joinid_G.device)
    order_VB = draws.hashed(draws.key(seed, step, SUBSET), soma_joinid_G).view(lanes, -1).argsort(dim=1)
    first_V1 = torch.arange(lanes, device=order_VB.device)[:, None] * order_VB.shape[1]
    return (order_VB[:, :cells] + first_V1).flatten().sort().values
