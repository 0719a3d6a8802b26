"""CTM: does this text describe this cell? (paper, section 3.2; hard negatives as in ALBEF)

Pairs are mined over the global batch, yet no cell state crosses the network: a text is an id that
every rank can look up, so a pair is evaluated on the rank that owns its cell.

Shape suffixes: P pairs, U distinct ones, T tokens of the lane's cells, W hidden width, K cells with a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from langcell.batch import Packed, TextTable
from langcell.model.langcell import MATCH, LangCell


@dataclass(frozen=True)
class Pairs:
    """(cell, text) pairs [P]. cell_P: int64, row of the cell; text_row_P: int64, row of the text table;
    match_P: bool; weight_P: float32, what the pair's loss counts in the mean over the global batch."""

    cell_P: Tensor
    text_row_P: Tensor
    match_P: Tensor
    weight_P: Tensor

    def of_rows(self, first: int, count: int) -> Pairs:
        """The pairs whose cells are rows [first, first + count), cells counted from `first`."""
        mine_P = ((self.cell_P >= first) & (self.cell_P < first + count)).nonzero().squeeze(1)
        return Pairs(
            self.cell_P[mine_P] - first,
            self.text_row_P[mine_P],
            self.match_P[mine_P],
            self.weight_P[mine_P],
        )


def matching_loss(
    model: LangCell, states_TW: Tensor, cells: Packed, pairs: Pairs, texts: TextTable
) -> Tensor:
    """Weighted sum of the cross-entropies of a lane's pairs (nats), at least one; cells are the lane's rows.

    Pairs of one cell with one text (a hard text drawn in the words of another, a stand-in of weight 0) are
    run once, with the weights of all.
    """
    n_texts = len(texts.packed)
    pair_U, of_P = (pairs.cell_P * n_texts + pairs.text_row_P).unique(return_inverse=True)  # by cell
    cell_K, cell_U = (pair_U // n_texts).unique(return_inverse=True)
    if len(cell_K) < len(cells):
        # Keys and values only of cells that have a pair: with 4 of 16, a third of the step.
        cells, states_TW = cells.select_with(cell_K, states_TW)
    logits_U2 = model.match(states_TW, cells, texts.packed.select(pair_U % n_texts), cell_U).float()
    target_P = torch.where(pairs.match_P, MATCH, 1 - MATCH)
    weight_U2 = logits_U2.new_zeros(logits_U2.shape)
    weight_U2.index_put_((of_P, target_P), pairs.weight_P, accumulate=True)
    return -(F.log_softmax(logits_U2, dim=1) * weight_U2).sum()
