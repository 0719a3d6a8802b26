"""Few-shot training of the whole LangCell: contrast and matching over the texts of the classes.

The objective of the released few-shot code, for a cell and the texts of C classes, its own among them:

    loss = CE over the classes of z_c . z_t / tau  +  CE over the classes of P(match)

The second term takes the probability itself as a logit, as released: it lies in [0, 1], so with C classes
the term cannot fall below log(1 + (C - 1) / e), and its gradient fades where the head is sure. Both
encoders, both projections and the matching head train; every cell meets the text of every class, so a step
costs cells x classes passes of the text encoder. The texts are encoded once for all cells of a forward.

Shape suffixes: B cells, C classes, T tokens of the cells, P = B x C pairs, Z joint space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langcell.batch import Packed
from langcell.model.langcell import MATCH, LangCell


class FewShot(nn.Module):
    """A LangCell and the texts of the classes. texts: C sequences; tau: temperature of the contrast."""

    def __init__(self, model: LangCell, texts: Packed, tau: float) -> None:
        super().__init__()
        self.model, self.tau = model, tau
        self.register_buffer("tokens_L", texts.tokens_T, persistent=False)
        self.register_buffer("cu_seqlens_C1", texts.cu_seqlens_B1, persistent=False)
        self._max_seqlen = texts.max_seqlen
        model.requires_grad_(True)
        for name, parameter in model.gene_head.named_parameters():
            if "decoder.weight" not in name:  # that is the encoder's own
                parameter.requires_grad_(False)

    @property
    def texts(self) -> Packed:
        """The texts, on the model's device."""
        return Packed(self.tokens_L, self.cu_seqlens_C1, self._max_seqlen)  # type: ignore[arg-type]

    @property
    def extra_tokens(self) -> int:
        """Tokens that each cell costs beside its own: those of all texts."""
        return len(self.tokens_L)  # type: ignore[arg-type]

    def forward(self, cells: Packed, class_B: Tensor, weight_B: Tensor) -> Tensor:
        """Sum over the cells of weight times loss (float32 scalar). class_B: int64, row of the cell's
        text."""
        model, texts = self.model, self.texts
        states_TW = model.cell_states(cells)
        z_BZ, z_CZ = model.project_cells(states_TW, cells), model.project_texts(texts)
        row_B = torch.arange(len(cells), device=class_B.device)
        row_C = torch.arange(len(texts), device=class_B.device)
        pairs = texts.select(row_C.repeat(len(cells)))
        logits_P2 = model.match(states_TW, cells, pairs, row_B.repeat_interleave(len(texts)))
        p_BC = logits_P2.float().softmax(dim=1)[:, MATCH].view(len(cells), len(texts))
        return (few_shot_loss(z_BZ @ z_CZ.T / self.tau, p_BC, class_B) * weight_B).sum()


def few_shot_loss(contrast_BC: Tensor, p_match_BC: Tensor, class_B: Tensor) -> Tensor:
    """Loss of each cell [B], from z_c . z_t / tau and P(match)."""
    return F.cross_entropy(contrast_BC.float(), class_B, reduction="none") + F.cross_entropy(
        p_match_BC, class_B, reduction="none"
    )
