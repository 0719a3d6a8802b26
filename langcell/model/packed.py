"""Attention over packed sequences, for both encoders, behind transformers' own BERT.

Hugging Face's `BertModel` supplies names, weights and layers; only its attention is exchanged, by
transformers' `AttentionInterface`. A batch is one row of T tokens: padding costs nothing because
there is none, and no sequence sees another. On a GPU in half precision the kernel is PyTorch's
variable-length flash attention. Elsewhere it is SDPA over runs of sequences of equal lengths:
exact, and on a CPU faster than padding (0.76 s against 1.4 s and more for a batch of uneven cells).
Attention weights have no dropout: the flash kernel has none, and on a CPU it costs four times the
whole forward; the views of C-C differ by hidden dropout.

Shape suffixes: T query tokens, S key tokens, B sequences, H heads, D head width, W hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, BertModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.bert.modeling_bert import BertCrossAttention

from langcell.batch import Packed

IMPLEMENTATION = "langcell_packed"


@dataclass(frozen=True)
class Spans:
    """Which queries see which keys: sequence b's queries [q_b, q_b+1) see its keys [k_b, k_b+1)."""

    cu_q_B1: Tensor
    cu_k_B1: Tensor
    max_q: int
    max_k: int

    @classmethod
    def within(cls, packed: Packed) -> Spans:
        """Self-attention: every token sees its own sequence."""
        return cls(packed.cu_seqlens_B1, packed.cu_seqlens_B1, packed.max_seqlen, packed.max_seqlen)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of neighbours that are alike: how many sequences, and the queries and the keys of each."""
        lengths = zip(self.cu_q_B1.diff().tolist(), self.cu_k_B1.diff().tolist(), strict=True)
        return [(len(list(run)), *alike) for alike, run in groupby(lengths)]


def attend(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, spans: Spans) -> Tensor:
    """Softmax attention inside each span, scores over sqrt(D) as BERT has it; returns [T, H, D].

    A sequence without queries is passed over; every query must have at least one key.
    """
    if q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q_THD, k_SHD, v_SHD, spans.cu_q_B1, spans.cu_k_B1, spans.max_q, spans.max_k)
        assert isinstance(out, Tensor)
        return out
    # `split`, whose backward is one concatenation; a slice's would fill and add a tensor of all tokens each.
    of_q, of_k = [n * q for n, q, _ in spans.runs], [n * k for n, _, k in spans.runs]
    parts = []
    for (n, lq, _), *qkv in zip(
        spans.runs, q_THD.split(of_q), k_SHD.split(of_k), v_SHD.split(of_k), strict=True
    ):
        if lq:
            q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)
            out = F.scaled_dot_product_attention(q, k, v)
            parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if parts else q_THD


def _hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    within: Spans,
    across: Spans | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention call: [1, H, T, D] in, [1, T, H, D] out."""
    spans = across if isinstance(module, BertCrossAttention) else within
    assert spans is not None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, spans).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _hf_attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def encode(
    bert: BertModel, packed: Packed, context_SW: Tensor | None = None, across: Spans | None = None
) -> Tensor:
    """Last hidden states [T, W] of packed sequences.

    With `context_SW`, every layer also cross-attends to the context under `across`.
    """
    return bert(
        input_ids=packed.tokens_T.unsqueeze(0),
        position_ids=packed.position_T.unsqueeze(0),
        encoder_hidden_states=None if context_SW is None else context_SW.unsqueeze(0),
        within=Spans.within(packed),
        across=across,
    ).last_hidden_state.squeeze(0)
