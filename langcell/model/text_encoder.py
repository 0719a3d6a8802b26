"""The text encoder: BERT, with a cross-attention module after each self-attention (g1 and g2).

One set of weights, two ways through it. Unimodal (g1): plain BERT, equal to `BertModel` to the
last bit. Multimodal (g2): every layer also attends to all states of a cell. transformers can add
cross-attention only to decoders, whose self-attention is causal; here the modules are added to a
bidirectional encoder (parameter names as in ALBEF and BLIP: `crossattention.self.key`, its key and
value maps taking the cell encoder's width).
"""

from __future__ import annotations

from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertAttention

from langcell.model.packed import IMPLEMENTATION


class TextEncoder(BertModel):
    """BERT whose layers can cross-attend to `config.encoder_width` wide states."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        for index, layer in enumerate(self.encoder.layer):
            cross = BertAttention(config, is_causal=False, layer_idx=index, is_cross_attention=True)
            cross.self.key = nn.Linear(config.encoder_width, cross.self.all_head_size)
            cross.self.value = nn.Linear(config.encoder_width, cross.self.all_head_size)
            layer.crossattention = cross
            # The layer's own gate for cross-attention; config.is_decoder stays False, or the
            # self-attention would silently turn causal.
            layer.is_decoder = True  # type: ignore[assignment]
        self.post_init()


def text_config(config: BertConfig, encoder_width: int) -> BertConfig:
    """`config` prepared for `TextEncoder`: packed attention, no attention dropout, the cell's width."""
    if config.is_decoder:
        raise ValueError("a text encoder must be bidirectional, but its config says is_decoder")
    config.encoder_width = encoder_width
    config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = IMPLEMENTATION
    return config
