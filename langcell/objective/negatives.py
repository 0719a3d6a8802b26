"""What may be a negative, and which hard ones are drawn.

Cells share texts, and a "T cell" text is true of a "CD8 T cell": neither is a negative. Two rows
(i, j) of the global batch are

- the same text: equal text_id;
- related: one cell-type term is an ontology ancestor of the other, or the terms are equal and the
  drawn text of j is a shortened variant (what told it from i's text is just what was left out), or
  both were drawn in the same words.

The preset `paper` knows neither: only a row itself is no negative of itself. Hard negatives are
drawn over the global batch in proportion to exp S by the Gumbel-max rule, with noise from a hash of
(seed, step, joinids of the pair), so that a draw depends on neither lane nor rank.

Shape suffixes: R rows of this rank's lanes, G rows of all lanes, N initiating rows, C terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from langcell.objective import draws

HARD_TEXT, HARD_CELL, SUBSET, SECOND_TEXT = 11, 12, 13, 14  # purposes of the draws


@dataclass(frozen=True)
class Rows:
    """Ids of all rows of the global batch (int64 [G]; `short_G` bool), in the order of lanes."""

    soma_joinid_G: Tensor
    text_id_G: Tensor
    term_G: Tensor
    text_row_G: Tensor
    short_G: Tensor

    def __len__(self) -> int:
        return self.soma_joinid_G.numel()


@dataclass(frozen=True)
class Relations:
    """Of each row r with each column g: whether they are each other's own (bool [R, G]), and whether
    column g is no negative of row r although it is not (bool [R, G])."""

    positive_RG: Tensor
    excluded_RG: Tensor

    @property
    def admissible_RG(self) -> Tensor:
        """What may be drawn as a non-match."""
        return ~(self.positive_RG | self.excluded_RG)


def relations(
    rows: Rows, row_R: Tensor, related_CC: Tensor, *, paper: bool, of: Literal["cells", "texts"]
) -> Relations:
    """Which texts (columns) are positives of the cells `row_R`, and which are left out of their
    denominators; with `of="texts"` the same of the texts of `row_R`, with cells as columns."""
    if paper:
        own_RG = row_R[:, None] == torch.arange(len(rows), device=row_R.device)
        return Relations(own_RG, torch.zeros_like(own_RG))
    term_R, term_G = rows.term_G[row_R, None], rows.term_G
    short_RG = rows.short_G if of == "cells" else rows.short_G[row_R, None]
    positive_RG = rows.text_id_G[row_R, None] == rows.text_id_G
    excluded_RG = related_CC[term_R, term_G] | ((term_R == term_G) & short_RG)
    excluded_RG |= rows.text_row_G[row_R, None] == rows.text_row_G
    return Relations(positive_RG, excluded_RG & ~positive_RG)


def draw_hard(
    scores_NG: Tensor, admissible_NG: Tensor, rows: Rows, row_N: Tensor, *, purpose: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """For each row, one admissible column in proportion to exp(score) (int64 [N]), and whether there is
    one (bool [N]); where there is none, the row itself.

    row_N: where the rows stand among the columns.
    """
    joinid_G = rows.soma_joinid_G
    bits_NG = draws.hashed(draws.key(seed, step, purpose), joinid_G[row_N, None], joinid_G)
    noisy_NG = (scores_NG.double() + draws.gumbel(bits_NG)).masked_fill(~admissible_NG, -torch.inf)
    exists_N = admissible_NG.any(dim=1)
    return torch.where(exists_N, noisy_NG.argmax(dim=1), row_N), exists_N


def initiators(soma_joinid_KB: Tensor, cells: int | None, *, seed: int, step: int) -> Tensor:
    """Which rows of each of K lanes start pairs (int64 [K, n], ascending): all, or a seeded choice of
    `cells`."""
    count = soma_joinid_KB.shape[1]
    if cells is None or cells >= count:
        return torch.arange(count, device=soma_joinid_KB.device).expand(len(soma_joinid_KB), -1)
    order_KB = draws.hashed(draws.key(seed, step, SUBSET), soma_joinid_KB).argsort(dim=1)
    return order_KB[:, :cells].sort(dim=1).values
