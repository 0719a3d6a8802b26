"""CTM: does this text describe this cell? (paper, section 3.2; hard negatives as in ALBEF)

Pairs are mined over the global batch, yet no cell state crosses the network: a text is an id that
every rank can look up, so a pair is evaluated on the rank that owns its cell.

Shape suffixes: P pairs, U distinct ones, T tokens of the lane's cells, W hidden width, K cells with a
pair.
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


@dataclass(frozen=True)
class DistinctPairs:
    """Each cell with each of its texts once [U], by cell. cell_U, text_row_U as in `Pairs`; weight_U2:
    float32, what its two log probabilities count, that of no match first."""

    cell_U: Tensor
    text_row_U: Tensor
    weight_U2: Tensor


def distinct_pairs(pairs: Pairs, n_texts: int) -> DistinctPairs:
    """The pairs, those of one cell with one text (a hard text drawn in the words of another, a stand-in of
    weight 0) as one with the weights of all. n_texts: rows of the text table."""
    pair_U, of_P = (pairs.cell_P * n_texts + pairs.text_row_P).unique(return_inverse=True)
    weight_U2 = pairs.weight_P.new_zeros(len(pair_U), 2)
    target_P = torch.where(pairs.match_P, MATCH, 1 - MATCH)
    weight_U2.index_put_((of_P, target_P), pairs.weight_P, accumulate=True)
    return DistinctPairs(pair_U // n_texts, pair_U % n_texts, weight_U2)


def matching_loss(
    model: LangCell, states_TW: Tensor, cells: Packed, pairs: DistinctPairs, texts: TextTable
) -> Tensor:
    """Weighted sum of the cross-entropies of a lane's pairs (nats; one at least)."""
    cell_K, of_U = pairs.cell_U.unique(return_inverse=True)
    if len(cell_K) < len(cells):
        # Keys and values only of cells that have a pair: with 4 of 16, a third of the step.
        cells, states_TW = cells.select_with(cell_K, states_TW)
    logits_U2 = model.match(states_TW, cells, texts.packed.select(pairs.text_row_U), of_U)
    return -(F.log_softmax(logits_U2.float(), dim=1) * pairs.weight_U2).sum()
