"""The cell encoder f: BERT over sentences of genes, with `<cls>` first (paper, section 3.1).

Geneformer's shape and parameter names (`BertModel` without the pooler), so that its checkpoints
load by name. Its 12-layer model is 512 wide with 8 heads, 1,024 wide in the feed-forward, context
2,048; the feed-forward here keeps that ratio of two for encoders from scratch.
"""

from __future__ import annotations

from transformers import BertConfig, BertModel

from langcell.model.options import ModelOptions
from langcell.model.packed import IMPLEMENTATION

PAD, MASK, FIRST_GENE = 0, 1, 2  # then the genes; <cls> is the last token


def scratch_config(options: ModelOptions, vocab_size: int, max_length: int) -> BertConfig:
    """Configuration of a cell encoder from scratch with the sizes of `options`.

    vocab_size: tokens, `<pad>`, `<mask>` and `<cls>` included; max_length: longest sentence (tokens).
    """
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=options.cell_width,
        num_hidden_layers=options.cell_layers,
        num_attention_heads=options.cell_heads,
        intermediate_size=2 * options.cell_width,
        max_position_embeddings=max_length,
        hidden_act="relu",  # as Geneformer
        hidden_dropout_prob=options.cell_dropout,
        attention_probs_dropout_prob=0.0,
        # BERT's 0.02 belongs to 768 features; the same variance of a layer's output at this width.
        initializer_range=0.02 * (768 / options.cell_width) ** 0.5,
        type_vocab_size=2,
        pad_token_id=PAD,
    )


def cell_encoder(config: BertConfig) -> BertModel:
    """A cell encoder of that configuration, with packed attention and fresh weights."""
    config._attn_implementation = IMPLEMENTATION
    return BertModel(config, add_pooling_layer=False)
