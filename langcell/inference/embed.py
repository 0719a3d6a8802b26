"""Cells and texts in the joint space.

Batches are cut by tokens, not by sequences: with packed sequences the memory of a forward follows
its tokens, and Census cells range from some hundred to 2,048 of them. Results do not depend on the
cut, because no attention crosses sequences.

Shape suffixes: N cells, K texts, T tokens, D hidden width, P width of the joint space, B sequences
of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from langcell.batch import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from langcell.model.langcell import LangCell


@contextmanager
def inferring(model: LangCell) -> Iterator[torch.device]:
    """Every module in evaluation mode and no graph recorded; yields the model's device.

    The mode of each module is put back afterwards (one by one: a locked text tower stays in
    evaluation mode while the rest of the model trains).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def spans(lengths: np.ndarray, budget: int) -> Iterator[tuple[int, int]]:
    """Consecutive runs [start, stop) of items whose lengths sum to at most `budget`.

    An item longer than the budget is a run of its own.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield start, stop
        start = stop


def batches(sequences: Packed, batch_tokens: int) -> Iterator[tuple[int, Packed]]:
    """Batches of consecutive sequences, at most `batch_tokens` tokens each, with their first index."""
    for start, stop in spans(sequences.lengths_B.cpu().numpy(), batch_tokens):
        rows = torch.arange(start, stop, device=sequences.tokens_T.device)
        yield start, sequences.select(rows)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> Packed:
    """Texts as packed token ids with the tokenizer's special tokens, cut at `max_length` tokens."""
    if not texts:
        return Packed.from_sequences([])
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
    return Packed.from_sequences(encoded["input_ids"])


def embed_cells(model: LangCell, cells: Packed, batch_tokens: int) -> Tensor:
    """Joint-space embedding of every cell: z_NP, float32 on the CPU, of unit length."""
    with inferring(model) as device:
        parts = []
        for _, batch in batches(cells, batch_tokens):
            batch = batch.to(device)
            parts.append(model.project_cells(model.cell_states(batch), batch).float().cpu())
    return torch.cat(parts) if parts else torch.empty(0, 0)


def project_texts(model: LangCell, texts: Packed, batch_tokens: int) -> Tensor:
    """Joint-space embedding of every tokenised text: z_KP, float32 on the model's device, of unit length."""
    with inferring(model) as device:
        parts = [model.project_texts(batch.to(device)).float() for _, batch in batches(texts, batch_tokens)]
    return torch.cat(parts) if parts else torch.empty(0, 0, device=device)


def embed_texts(
    model: LangCell,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    batch_tokens: int = 16_384,
) -> Tensor:
    """Joint-space embedding of every text: z_KP, float32 on the CPU, of unit length."""
    return project_texts(model, tokenize(tokenizer, texts, max_length), batch_tokens).cpu()
