"""Micro-batches as training gets them: the real plan over a corpus that has the Census's lengths.

A generated Census (`census.synthetic`) is prepared like any other, with as many genes for tokens as
Geneformer's dictionary has, the most frequent: the width of the vocabulary decides what masked genes cost.
Every cell is a train cell. Windows are dealt as a lane's stream deals them, without Ray.

Shape suffixes: C cells of the corpus, B of a micro-batch, K distinct texts, V their variants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tiledbsoma as soma
import torch

from langcell.batch import MicroBatch, TextTable
from langcell.bench.data import GENES
from langcell.bench.processes import Work
from langcell.bench.ray_work import start_ray
from langcell.cells.options import BetaOptions, TokenOptions
from langcell.cells.vocabulary import Vocabulary
from langcell.census.layout import ORGANISM
from langcell.census.options import CensusOptions
from langcell.corpus.blocks import row_groups
from langcell.corpus.manifest import Manifest
from langcell.corpus.microbatch import micro_batch
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan
from langcell.corpus.prepare import prepare
from langcell.corpus.stream import deal_window
from langcell.corpus.text_table import load_text_table
from langcell.model.interop import load_tokenizer
from langcell.text.options import TextOptions

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def corpus(uri: str, directory: str, cpus: int) -> Work:
    """Prepares the Census at `uri` in the folder `directory`; its vocabulary's size."""

    def work() -> int:
        var = f"{uri}/census_data/{ORGANISM}/ms/RNA/var"
        with soma.DataFrame.open(var) as genes:
            table = genes.read(column_names=["feature_id", "nnz"]).concat()
        nnz = table["nnz"].to_numpy()
        frequent = np.sort(np.argsort(-nnz, kind="stable")[: min(GENES, int((nnz > 0).sum()))])
        vocabulary = Vocabulary([table["feature_id"][gene].as_py() for gene in frequent.tolist()])
        path = f"{directory}.vocabulary.json"
        vocabulary.write(path)
        start_ray(cpus)
        prepare(
            CensusOptions(uri=uri, filter=""),
            BetaOptions(),
            TokenOptions(vocabulary=path),
            TextOptions(),
            CorpusOptions(dir=directory, test_share=0, val_share=0),
            [],
            [],
        )
        return vocabulary.size

    return work


@dataclass(frozen=True)
class Dealt:
    """The corpus's texts and the first micro-batches of its plan's first epoch (lane 0)."""

    texts: TextTable
    batches: list[MicroBatch]


def deal(directory: str, text_init: str, micro_batch_cells: int, count: int, seed: int) -> Dealt:
    """`count` micro-batches of so many cells each, in the order of training."""
    texts = load_text_table(directory, load_tokenizer(text_init), TextOptions().max_length)
    groups = row_groups(Manifest.read(directory), "train")
    plan = Plan(groups, seed, micro_batch_cells, micro_batch_cells, CorpusOptions().window_steps)
    batches: list[MicroBatch] = []
    for window in plan.windows(0, 0):
        rows = deal_window(directory, plan, window)
        for i in range(len(rows)):
            if len(batches) == count:
                return Dealt(texts, batches)
            batches.append(
                micro_batch(
                    rows.slice(i, 1), texts, epoch=0, short_share=TextOptions().short_share, seed=seed
                )
            )
    return Dealt(texts, batches)


def first_cells(batch: MicroBatch, count: int) -> MicroBatch:
    """The first cells of a micro-batch."""
    return MicroBatch(
        cells=batch.cells.select(torch.arange(min(count, len(batch)))),
        soma_joinid_B=batch.soma_joinid_B[:count],
        text_id_B=batch.text_id_B[:count],
        term_B=batch.term_B[:count],
        text_row_B=batch.text_row_B[:count],
        short_B=batch.short_B[:count],
    )


def length_law(directory: str, dealt: Dealt) -> dict[str, Any]:
    """How long the cells and texts of the corpus are, and what its micro-batches are like.

    cells: tokens; `cut`: share that fills the context; `mean_square_over_mean`: E[L^2]/E[L], the mean number
    of tokens that a token attends to; `padding`: tokens of a batch padded to its longest over its own.
    texts: tokens of the corpus's distinct full texts; batches: of those that are measured.
    """
    length_C = pq.read_table(f"{directory}/blocks/train", columns=["length"])["length"].to_numpy()
    full_K = dealt.texts.packed.lengths_B.numpy()[dealt.texts.row_KV[:, 0]]
    of_batches = [batch.cells.lengths_B.numpy() for batch in dealt.batches]
    rows = [batch.text_row_B for batch in dealt.batches]
    drawn_B = dealt.texts.packed.lengths_B[torch.cat(rows)]
    return {
        "cells": _spread(length_C) | {"cut": float((length_C == TokenOptions().max_length).mean())},
        "texts": _spread(full_K),
        "batches": {
            "count": len(dealt.batches),
            "cells": len(dealt.batches[0]),
            "mean_tokens": float(np.mean([length_B.mean() for length_B in of_batches])),
            "padding": float(
                np.mean([length_B.max() * len(length_B) / length_B.sum() for length_B in of_batches])
            ),
            "mean_text_tokens": float(drawn_B.double().mean()),
            "distinct_texts": float(np.mean([len(row_B.unique()) for row_B in rows])),
        },
    }


def _spread(lengths: np.ndarray) -> dict[str, Any]:
    lengths = lengths.astype(np.float64)
    return {
        "n": len(lengths),
        "mean": float(lengths.mean()),
        "quantiles": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES},
        "mean_square_over_mean": float((lengths**2).mean() / lengths.mean()),
    }
