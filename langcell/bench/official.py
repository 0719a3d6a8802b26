"""Zero-shot annotation as LangCell's notebook has it: what ours is measured against.

The released algorithm over the weights of a `LangCell`, in plain transformers and PyTorch: batches of 32
cells padded to their longest and masked, and for every batch every candidate in turn, its text tokenised
again and copied for every cell, through the multimodal encoder, whose every layer projects keys and values of
all the cells anew.

    logits1 = softmax over the candidates of z_c . z_t / tau
    logits2 = softmax over the candidates of P(match)
    score   = a * logits1 + (1 - a) * logits2

Attention is transformers' SDPA, which is faster than the notebook's own (it writes every matrix of weights
out). Two savings of ours can be switched on alone: `packing` (no padding, of cells), and `keys` (keys and
values of a batch projected once for all candidates). Nothing else is changed by them.

Shape suffixes: N cells, C candidates, B cells of a batch, L their longest, T their tokens, R tokens of a
text, W, H hidden widths, Z joint space.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from langcell.batch import Packed
from langcell.bench.hf_step import pad
from langcell.model.langcell import MATCH, LangCell
from langcell.model.text_encoder import TextEncoder

BATCH_CELLS = 32
"""Cells of a batch, as in the notebook."""


class Official:
    """The notebook's road over the weights of `model`, which stays as it is.

    tau: temperature of the contrast; a: weight of it in the score; max_length: most tokens of a text.
    """

    def __init__(
        self,
        model: LangCell,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tau: float,
        a: float,
        max_length: int,
        packing: bool = False,
        keys: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.packing = model, tokenizer, packing
        self.tau, self.a, self.max_length = tau, a, max_length
        self.cell_bert = BertModel(_sdpa(model.cell_bert.config), add_pooling_layer=False).eval()
        self.cell_bert.load_state_dict(model.cell_bert.state_dict())
        self.text_bert = TextEncoder(_sdpa(model.text_bert.config)).eval()
        self.text_bert.load_state_dict(model.text_bert.state_dict())
        if keys:
            for layer in self.text_bert.encoder.layer:
                of = layer.crossattention.self
                of.key, of.value = _Once(of.key), _Once(of.value)

    @torch.inference_mode()
    def annotate(self, cells: Packed, texts: list[str]) -> Tensor:
        """Score of every text for every cell: float32 [N, C], each row sums to 1."""
        z_CZ = torch.cat([self._project_text(text) for text in texts])
        batches = torch.arange(len(cells)).split(BATCH_CELLS)
        return torch.cat([self._annotate_batch(cells.select(rows), texts, z_CZ) for rows in batches])

    def _annotate_batch(self, cells: Packed, texts: list[str], z_CZ: Tensor) -> Tensor:
        states, first_BW, mask_BL = self._encode(cells)
        z_BZ = F.normalize(self.model.cell_proj(first_BW), dim=-1)
        contrast_BC = (z_BZ @ z_CZ.T / self.tau).softmax(dim=1)
        match = self._match_packed if self.packing else self._match_padded
        p_BC = torch.zeros_like(contrast_BC)
        for candidate, text in enumerate(texts):
            p_BC[:, candidate] = match(text, cells, states, mask_BL).softmax(dim=1)[:, MATCH]
        return self.a * contrast_BC + (1 - self.a) * p_BC.softmax(dim=1)

    def _encode(self, cells: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """States of the cells (padded [B, L, W], or packed [T, W]), those of `<cls>`, the mask [B, L]."""
        tokens_BL, mask_BL, _ = pad(cells)
        if self.packing:
            states_TW = self.model.cell_states(cells)
            return states_TW, states_TW[cells.starts_B], mask_BL
        states_BLW = self.cell_bert(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLW, states_BLW[:, 0], mask_BL

    def _project_text(self, text: str) -> Tensor:
        """Embedding of a text [1, Z]."""
        states_1RH = self.text_bert(**self._tokenize([text])).last_hidden_state
        pooled_1H = states_1RH[:, 0] if self.model.pooling == "cls" else states_1RH.mean(dim=1)
        return F.normalize(self.model.text_proj(pooled_1H), dim=-1)

    def _match_padded(self, text: str, _: Packed, states_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Two logits of the text and each cell [B, 2]."""
        states_BRH = self.text_bert(
            **self._tokenize([text] * len(mask_BL)),
            encoder_hidden_states=states_BLW,
            encoder_attention_mask=mask_BL,
        ).last_hidden_state
        return self.model.ctm_head(states_BRH[:, 0])

    def _match_packed(self, text: str, cells: Packed, states_TW: Tensor, _: Tensor) -> Tensor:
        """As `_match_padded`, of packed cells."""
        tokens_BR = self._tokenize([text] * len(cells))["input_ids"]
        texts = Packed.from_sequences(list(tokens_BR.numpy()))
        return self.model.match(states_TW, cells, texts, torch.arange(len(cells)))

    def _tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(
            self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )


class _Once(nn.Module):
    """A projection that is computed once for as long as it is asked about the same tensor."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self._asked: Tensor | None = None
        self._found: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        if self._found is None or states is not self._asked:
            self._asked, self._found = states, self.projection(states)
        return self._found


def _sdpa(config: BertConfig) -> BertConfig:
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    return config
