"""A LangCell small enough to check by hand, and batches whose texts repeat unevenly."""

from __future__ import annotations

import torch
from transformers import BertConfig

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.model.langcell import LangCell
from langcell.objective.options import ObjectiveOptions
from langcell.objective.stages import Stage

VOCAB = 40  # <pad>, <mask>, 37 genes, <cls>
CLS = VOCAB - 1
SEED = 7
# Twelve cells of four texts, unevenly: the first four hold text 0 three times, the last four one text.
TEXT = [0, 0, 0, 1, 2, 3, 2, 1, 3, 3, 3, 3]
VARIANT = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
TERM = [0, 1, 2, 1]  # term of each text; texts 1 and 3 share one
LENGTH = [9, 5, 12, 7, 7, 11, 4, 10, 6, 13, 8, 3]


def model(dropout: float = 0.0, double: bool = False) -> LangCell:
    """Two layers each, the same weights every time."""
    torch.manual_seed(0)
    # Wide initial weights: with BERT's 0.02 all cells are nearly one, and gradients mostly rounding.
    shape = {
        "num_hidden_layers": 2, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": dropout,
        "initializer_range": 0.2,
    }  # fmt: skip
    cell = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, **shape,
    )  # fmt: skip
    text = BertConfig(
        vocab_size=50, hidden_size=24, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=16, **shape,
    )  # fmt: skip
    made = LangCell(cell, text, projection=8, pooling="cls")
    return made.double() if double else made


def texts() -> TextTable:
    """Four texts of two variants; term 0 is an ancestor of term 1."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 50, (n,), generator=generator).numpy() for n in (6, 3, 8, 4, 5, 3, 7, 4)]
    related = torch.zeros(3, 3, dtype=torch.bool)
    related[0, 1] = related[1, 0] = True
    return TextTable(
        Packed.from_sequences(rows),
        text_id=torch.tensor([100, 200, 300, 400]).numpy(),
        row_KV=torch.arange(8).view(4, 2).numpy(),
        term=torch.tensor(TERM).numpy(),
        related_CC=related,
    )


def batch(first: int = 0, count: int = 8) -> MicroBatch:
    """Cells [first, first + count) of the twelve."""
    generator = torch.Generator().manual_seed(2)
    sentences = [
        torch.cat([torch.tensor([CLS]), 2 + torch.randperm(VOCAB - 3, generator=generator)[: n - 1]]).numpy()
        for n in LENGTH
    ]
    here = slice(first, first + count)
    text, variant = torch.tensor(TEXT[here]), torch.tensor(VARIANT[here])
    return MicroBatch(
        cells=Packed.from_sequences(sentences[here]),
        soma_joinid_B=torch.arange(len(TEXT))[here] * 31 + 5,
        text_id_B=(text + 1) * 100,
        term_B=torch.tensor(TERM)[text],
        text_row_B=text * 2 + variant,
        short_B=variant > 0,
    )


def stage(number: int = 2, *, dropout: float = 0.0, text_train: str = "all", **options: object) -> Stage:
    """A stage over the toy model."""
    return Stage(
        model(dropout),
        ObjectiveOptions(**options),  # type: ignore[arg-type]
        stage=number,
        cls=CLS,
        seed=SEED,
        text_train=text_train,
        texts=texts(),
    )
