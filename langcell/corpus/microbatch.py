"""A row of a stream as the tensors of a micro-batch.

Apart from the streams, whose tasks then load no torch: a process of theirs starts in 2.5 s instead of 5 and
holds 180 MB instead of 370, once for each CPU.

Shape suffixes: B cells of a micro-batch, T their tokens, K distinct texts, V variants of one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from langcell.batch import MicroBatch, Packed, TextTable


def draw_variants(
    text_id_B: np.ndarray, *, variants: int, short_share: float, seed: int, epoch: int
) -> np.ndarray:
    """Variant that each text is read in this epoch (int64): a pure function of (seed, epoch, text_id).

    0 is the full text; a shortened one with probability `short_share`, all equally likely.
    """
    if variants == 1:
        return np.zeros(len(text_id_B), dtype=np.int64)
    distinct_K, inverse_B = np.unique(text_id_B, return_inverse=True)
    drawn_K = np.zeros(len(distinct_K), dtype=np.int64)
    for k, text_id in enumerate(distinct_K):
        generator = np.random.default_rng([seed, epoch, int(np.uint64(text_id))])
        if generator.random() < short_share:
            drawn_K[k] = generator.integers(1, variants)
    return drawn_K[inverse_B]


def micro_batch(row: pa.Table, texts: TextTable, *, epoch: int, short_share: float, seed: int) -> MicroBatch:
    """The tensors of a one-row table of `deal_window`. Their order is free: draws are by joinid."""
    column = {name: row[name].combine_chunks().flatten().to_numpy() for name in row.column_names}
    offsets = np.concatenate([[0], np.cumsum(column["length"])])
    text_id_B = column["text_id"]
    variant_B = draw_variants(
        text_id_B, variants=texts.variants, short_share=short_share, seed=seed, epoch=epoch
    )
    index_B = texts.index(text_id_B)
    row_B = texts.row_KV[index_B, variant_B]
    # A full text may say no more than a shortened one does: that a cell is of a type.
    short_B = (variant_B > 0) | ((row_B == texts.row_KV[index_B, -1]) & (texts.variants > 1))
    return MicroBatch(
        cells=Packed.from_offsets(column["tokens"], offsets),
        soma_joinid_B=torch.from_numpy(column["soma_joinid"].copy()),
        text_id_B=torch.from_numpy(text_id_B.copy()),
        term_B=torch.from_numpy(texts.term[index_B]),
        text_row_B=torch.from_numpy(row_B),
        short_B=torch.from_numpy(short_B),
    )
