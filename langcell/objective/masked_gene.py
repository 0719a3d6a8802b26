"""MGM: masked gene modelling (paper, section 3.2; BERT's 80/10/10).

Chosen positions and replacements are counter-based draws per (step, cell, position). Logits are
computed at the chosen positions alone: with a 25k vocabulary that is 15% of the head's work.

Shape suffixes: T tokens of the lane's cells, M chosen positions, B cells, W hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langcell.batch import Packed
from langcell.model.cell_encoder import FIRST_GENE, MASK
from langcell.model.heads import GeneHead
from langcell.objective import draws

CHOOSE, REPLACE, GENE = 1, 2, 3  # purposes of the draws


@dataclass(frozen=True)
class Masked:
    """The corrupted cells; index_M: chosen positions; target_M: the genes that stood there."""

    cells: Packed
    index_M: Tensor
    target_M: Tensor


def mask_genes(
    cells: Packed, soma_joinid_B: Tensor, *, ratio: float, seed: int, step: int, cls: int
) -> Masked:
    """Choose each gene with probability `ratio`; of these 80% become `<mask>`, 10% a random gene.

    cls: id of `<cls>`, the last token; it and `<pad>` are never chosen.
    """
    tokens_T = cells.tokens_T
    cell_T, position_T = soma_joinid_B[cells.sequence_T], cells.position_T

    def draw(purpose: int) -> Tensor:
        return draws.hashed(draws.key(seed, step, purpose), cell_T, position_T)

    is_gene_T = (tokens_T >= FIRST_GENE) & (tokens_T < cls)
    chosen_T = (draws.uniform(draw(CHOOSE)) < ratio) & is_gene_T
    replace_T = draws.uniform(draw(REPLACE))
    random_T = FIRST_GENE + (draws.uniform(draw(GENE)) * (cls - FIRST_GENE)).long()
    corrupted_T = torch.where(chosen_T & (replace_T < 0.8), MASK, tokens_T)
    corrupted_T = torch.where(chosen_T & (replace_T >= 0.9), random_T, corrupted_T)
    index_M = chosen_T.nonzero().squeeze(1)
    return Masked(cells.with_tokens(corrupted_T), index_M, tokens_T[index_M])


def gene_loss(head: GeneHead, states_TW: Tensor, masked: Masked, chunk: int) -> Tensor:
    """Sum of the cross-entropies at the chosen positions (nats), `chunk` positions' logits at a time."""
    return head(states_TW[masked.index_M], masked.target_M, chunk)
