"""A text encoder of one layer, for runs that are about anything but words.

A step of a tiny run's stage 2 takes 1.1 s with MiniLM on two old cores, and 0.27 s with this one. Runs of the
main job itself (tests/recipes/test_pretrain.py, `make demo`) have MiniLM.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from langcell.model.interop import load_tokenizer


def small_text(folder: Path) -> Path:
    """`folder`, with a random BERT of one layer of 32 in it and MiniLM's tokenizer."""
    tokenizer = load_tokenizer("minilm")
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
