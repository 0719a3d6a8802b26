"""The small modules on top of the encoders.

Logits over 25k genes are the largest tensor of a step (25,000 masked genes of 128 cells: 2.5 GB in float32,
and as much again for their gradient). `_SummedCrossEntropy` never holds more than a chunk of them: it
finds the gradients in the forward, chunk by chunk, while the logits are at hand, so that nothing is computed
twice, and the backward only scales them. Chunks are loops inside one call of a module, for their number
differs from rank to rank and ZeRO-3 counts calls.

Shape suffixes: M masked positions, W hidden width, V vocabulary, C a chunk of the positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead


class GeneHead(nn.Module):
    """BERT's prediction head over genes, its output weights tied to the gene embeddings.

    Named as in `BertForMaskedLM` (`predictions.*`), so that Geneformer's head loads by name. It is
    called on masked positions alone: the vocabulary is 25k wide and 85% of the positions have no
    target.
    """

    def __init__(self, config: BertConfig, cell_bert: BertModel) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.predictions.decoder = _Decoder(config.hidden_size, config.vocab_size)
        self.predictions.decoder.weight = cell_bert.embeddings.word_embeddings.weight
        self.predictions.decoder.bias = self.predictions.bias

    def forward(self, states_MW: Tensor, target_M: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Logits over the vocabulary [M, V]; with `target_M` (int64) the sum of their cross-entropies
        instead (nats, float32 scalar), `chunk` positions' logits at a time (None: all)."""
        if target_M is None:
            return self.predictions(states_MW)
        return self.predictions.decoder(self.predictions.transform(states_MW), target_M, chunk)


class _Decoder(nn.Linear):
    """The output layer and its loss: as one module, whose weights ZeRO-3 gathers for either."""

    def forward(self, hidden_MW: Tensor, target_M: Tensor | None = None, chunk: int | None = None) -> Tensor:
        if target_M is None:
            return super().forward(hidden_MW)
        return _SummedCrossEntropy.apply(
            hidden_MW,
            self.weight,
            self.bias,
            target_M,
            chunk or max(1, len(hidden_MW)),
            torch.is_grad_enabled(),
        )


class _SummedCrossEntropy(torch.autograd.Function):
    """sum over m of -log softmax(hidden_m W^T + b)[target_m]; softmax and sums in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor,
        target_M: Tensor,
        chunk: int,
        with_gradient: bool,
    ) -> Tensor:
        loss = torch.zeros((), device=hidden_MW.device)
        if with_gradient:
            to_hidden_MW = torch.empty_like(hidden_MW)
            to_weight_VW = torch.zeros_like(weight_VW, dtype=torch.float32)
            to_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        for begin in range(0, len(hidden_MW), chunk):
            here = slice(begin, begin + chunk)
            hidden_CW, target_C1 = hidden_MW[here], target_M[here, None]
            logits_CV = F.linear(hidden_CW, weight_VW, bias_V).float()
            log_z_C = logits_CV.logsumexp(dim=1)
            loss += log_z_C.sum() - logits_CV.gather(1, target_C1).sum()
            if with_gradient:
                slope_CV = logits_CV.sub_(log_z_C[:, None]).exp_()  # softmax, less one at the target
                slope_CV.scatter_add_(1, target_C1, slope_CV.new_full(target_C1.shape, -1.0))
                to_bias_V += slope_CV.sum(dim=0)
                slope_CV = slope_CV.to(hidden_MW.dtype)
                torch.mm(slope_CV, weight_VW, out=to_hidden_MW[here])
                if to_weight_VW.dtype == slope_CV.dtype:
                    to_weight_VW.addmm_(slope_CV.T, hidden_CW)
                else:
                    to_weight_VW += slope_CV.T @ hidden_CW
        if with_gradient:
            ctx.save_for_backward(to_hidden_MW, to_weight_VW.to(weight_VW.dtype), to_bias_V.to(bias_V.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_MW, weight_VW, bias_V = ctx.saved_tensors
        return hidden_MW * grad, weight_VW * grad, bias_V * grad, None, None, None
