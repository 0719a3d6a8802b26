"""The text table of a corpus as training holds it: tokenised once, in memory on every rank.

Cells carry ids of texts, so a text is tokenised once however many cells have it (7.1M cells of CELLxGENE
carry 11,260). Apart from `texts`, which makes the table: training alone needs torch, 3 s of imports.

Shape suffixes: K distinct texts, V variants of each, B texts to tokenise, D distinct terms, C those and the
cell types without a term.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from langcell.batch import Packed, TextTable
from langcell.corpus.texts import Texts, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def related_terms(texts: Texts) -> torch.Tensor:
    """Whether one of two terms of `texts.terms` is an ontology ancestor of the other: bool [D, D].

    Symmetric; false on the diagonal.
    """
    index = {term: i for i, term in enumerate(texts.terms)}
    related_DD = torch.zeros(len(index), len(index), dtype=torch.bool)
    for term, ancestors in zip(texts.term, texts.ancestors, strict=True):
        for other in index.keys() & set(ancestors) if term else ():
            related_DD[index[term], index[other]] = related_DD[index[other], index[term]] = True
    return related_DD


def tokenise_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Packed, np.ndarray]:
    """Token ids of B `texts`, special tokens included, and which were cut at `max_length` (bool [B])."""
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    # A text that is too long comes back as several pieces; its first is the text, cut.
    _, first_B, pieces_B = np.unique(
        encoded["overflow_to_sample_mapping"], return_index=True, return_counts=True
    )
    return Packed.from_sequences([encoded["input_ids"][i] for i in first_B]), pieces_B > 1


def load_text_table(dir: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TextTable:
    """The texts of the corpus in `dir`, tokenised once, as every rank holds them.

    max_length: most tokens of a text; full texts that are longer are cut, counted and logged.
    """
    texts = read_texts(dir)
    # Many texts share a shortened variant: each distinct one is tokenised once.
    row_of: dict[str, int] = {}
    row_KV = np.array([[row_of.setdefault(v, len(row_of)) for v in variants] for variants in texts.variants])
    packed, cut = tokenise_texts(list(row_of), tokenizer, max_length)
    if n_cut := int(cut[row_KV[:, 0]].sum()):
        log.warning("%d of %d texts are longer than %d tokens and are cut", n_cut, len(texts), max_length)
    related_DD = related_terms(texts)
    # A cell type without a term is known by its words, the last variant: related to nothing but itself.
    term_K, unknown_K = texts.term_index, texts.term_index < 0
    words, place = np.unique(row_KV[unknown_K, -1], return_inverse=True)
    term_K[unknown_K] = len(related_DD) + place
    n_terms = len(related_DD) + len(words)
    related_CC = torch.zeros(n_terms, n_terms, dtype=torch.bool)
    related_CC[: len(related_DD), : len(related_DD)] = related_DD
    return TextTable(packed, texts.text_id, row_KV, term_K, related_CC)
