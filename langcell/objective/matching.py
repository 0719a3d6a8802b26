"""CTM: does this text describe this cell? (paper, section 3.2; hard negatives as in ALBEF)

Pairs are mined over the global batch, yet no cell state crosses the network: a text is an id that
every rank can look up, so a pair is evaluated on the rank that owns its cell.

Shape suffixes: P pairs, T tokens of the lane's cells, W hidden width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from langcell.batch import Packed, TextTable
from langcell.model.langcell import LangCell
from langcell.objective.negatives import Pairs, Rows


def local_pairs(pairs: Pairs, first: int, count: int) -> Pairs:
    """The pairs whose cells are rows [first, first + count), ascending, cells counted from `first`."""
    mine_P = ((pairs.cell_P >= first) & (pairs.cell_P < first + count)).nonzero().squeeze(1)
    mine_P = mine_P[pairs.cell_P[mine_P].argsort(stable=True)]
    return Pairs(
        pairs.cell_P[mine_P] - first, pairs.text_P[mine_P], pairs.match_P[mine_P], pairs.weight_P[mine_P]
    )


def matching_loss(
    model: LangCell, states_TW: Tensor, cells: Packed, pairs: Pairs, rows: Rows, texts: TextTable
) -> Tensor:
    """Weighted sum of the cross-entropies of local pairs (nats)."""
    cell_K, cell_P = pairs.cell_P.unique(return_inverse=True)
    if len(cell_K) < len(cells):
        # Keys and values only of cells that have a pair: with 4 of 16, a third of the step.
        cells, states_TW = cells.select_with(cell_K, states_TW)
    drawn = texts.packed.select(rows.text_row_G[pairs.text_P])
    logits_P2 = model.match(states_TW, cells, drawn, cell_P)
    losses_P = F.cross_entropy(logits_P2.float(), pairs.match_P.long(), reduction="none")
    return (losses_P * pairs.weight_P).sum()
