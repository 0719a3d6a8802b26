"""LangCell: five modules, three ways through them (paper, section 3).

`cell_bert`, `text_bert`, `cell_proj`, `text_proj` and `ctm_head` carry the names of the official
release and are what an export holds; `gene_head` serves pretraining only. A cell is read once and
its states feed everything: its embedding, masked genes, and, as keys and values, the matching of
any number of texts.

Shape suffixes: T tokens of the cells, B cells, K texts, L tokens of the texts, P pairs, W hidden
width of the cell encoder, H of the text encoder, Z width of the joint space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from langcell.batch import Packed
from langcell.model.cell_encoder import cell_encoder
from langcell.model.heads import GeneHead
from langcell.model.packed import Spans, encode
from langcell.model.text_encoder import TextEncoder, text_config

MATCH = 1  # column of the two matching logits


class LangCell(nn.Module):
    """Both encoders and their heads, fresh; `interop` loads weights into them."""

    def __init__(self, cell: BertConfig, text: BertConfig, projection: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.cell_bert = cell_encoder(cell)
        self.gene_head = GeneHead(cell, self.cell_bert)
        self.cell_proj = nn.Linear(cell.hidden_size, projection)
        self.text_bert = TextEncoder(text_config(text, cell.hidden_size))
        self.text_proj = nn.Linear(text.hidden_size, projection)
        self.ctm_head = nn.Linear(text.hidden_size, 2)
        # An orthogonal map keeps the geometry of the sentence encoder it starts from; with the
        # default initialisation unseen words land in random places.
        nn.init.orthogonal_(self.text_proj.weight)
        nn.init.zeros_(self.text_proj.bias)

    def checkpoint_layers(self) -> None:
        """From now on both encoders, in training, keep only what enters each layer and compute the layer
        again in the backward, with the same dropout: the same gradients for a third more work."""
        for bert in (self.cell_bert, self.text_bert):
            bert.activation_checkpointing_enable()

    def compile_layers(self) -> None:
        """From now on the layers of both encoders are compiled at their first call, for any length.

        Layer by layer: one compilation serves all layers of an encoder, and names of parameters stay. They
        draw the dropout that they would uncompiled, with and without gradient the same.
        """
        for bert in (self.cell_bert, self.text_bert):
            for layer in bert.encoder.layer:
                layer.compile(dynamic=True, options={"fallback_random": True})

    def cell_states(self, cells: Packed) -> Tensor:
        """f: all states of the cell encoder [T, W]."""
        return encode(self.cell_bert, cells)

    def project_cells(self, states_TW: Tensor, cells: Packed) -> Tensor:
        """z_c [B, Z], L2-normalised, float32 (bf16 cosines near 1 would all be one), from `<cls>`."""
        return F.normalize(self.cell_proj(states_TW[cells.starts_B]).float(), dim=-1)

    def pool_texts(self, texts: Packed) -> Tensor:
        """g1 before its projection [K, H]: the state of `[CLS]`, or the mean over the tokens."""
        states_LH = encode(self.text_bert, texts)
        if self.pooling == "cls":
            return states_LH[texts.starts_B]
        sums_KH = states_LH.new_zeros(len(texts), states_LH.shape[1])
        sums_KH = sums_KH.index_add(0, texts.sequence_T, states_LH)
        return sums_KH / texts.lengths_B.unsqueeze(1).to(states_LH.dtype)

    def project_pooled(self, pooled_KH: Tensor) -> Tensor:
        """z_t [K, Z], L2-normalised, float32, from pooled states."""
        return F.normalize(self.text_proj(pooled_KH.to(self.text_proj.weight.dtype)).float(), dim=-1)

    def project_texts(self, texts: Packed) -> Tensor:
        """g1: z_t [K, Z], L2-normalised."""
        return self.project_pooled(self.pool_texts(texts))

    def match(self, states_TW: Tensor, cells: Packed, texts: Packed, cell_of_pair_P: Tensor) -> Tensor:
        """g2: two logits [P, 2] of each (cell, text) pair, column 1 for a match.

        texts: one sequence a pair; cell_of_pair_P: int64, ascending. The pairs of a cell stand side
        by side, so that all their tokens are one span of queries over that cell's states: keys and
        values are projected once per cell and layer, never copied per pair.
        """
        tokens_B = torch.zeros(len(cells), dtype=torch.int64, device=states_TW.device)
        tokens_B.index_add_(0, cell_of_pair_P, texts.lengths_B.long())
        cu_q_B1 = F.pad(tokens_B.cumsum(0), (1, 0)).int()
        across = Spans(cu_q_B1, cells.cu_seqlens_B1, int(tokens_B.max()), cells.max_seqlen)
        states_LH = encode(self.text_bert, texts, context_SW=states_TW, across=across)
        return self.ctm_head(states_LH[texts.starts_B])
