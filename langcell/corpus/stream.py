"""Per-rank Ray Data streams of micro-batches.

Each training worker builds and consumes its own ordered stream: one row in is one window of one of
its lanes, rows out are micro-batches, step by step. Reading, shuffling and dealing run in Ray tasks
on CPU nodes, ahead of the step; one stream serves all epochs of a stage, so that only its first
micro-batch waits for worker processes to start (2-18 s, against 0.5-2 s a stream per epoch).
A resume starts the stream at the right window; only a part of one window is read for nothing.

Order is kept by Ray Data's `preserve_order`; its default reservation of resources would leave half
of the CPUs idle. Both are set in the worker's own DataContext.

Shape suffixes: B cells of a micro-batch, T their tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from ray.data import DataContext

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.corpus.plan import Plan, Window
from langcell.corpus.storage import open_root

COLUMNS = ["soma_joinid", "text_id", "length", "tokens"]


def read_cells(corpus_dir: str, window: Window) -> pa.Table:
    """The window's cells in plan order (columns `COLUMNS`)."""
    root = open_root(corpus_dir)
    tables = []
    for file, spans in itertools.groupby(window.spans, key=lambda span: span.file):
        with pq.ParquetFile(file, filesystem=root) as parquet:
            tables += [
                parquet.read_row_group(s.index, columns=COLUMNS).slice(s.start, s.stop - s.start)
                for s in spans
            ]
    return pa.concat_tables(tables)


def deal_window(corpus_dir: str, plan: Plan, window: Window) -> pa.Table:
    """The window's micro-batches, one a row: the lists soma_joinid, text_id, length and tokens."""
    cells = read_cells(corpus_dir, window)
    dealt_MB = plan.deal(window, cells["length"].to_numpy())
    batches = cells.take(dealt_MB.ravel())
    columns = {}
    for name in ("soma_joinid", "text_id", "length", "tokens"):
        column = batches[name].combine_chunks()
        ends = np.arange(len(dealt_MB) + 1) * plan.micro_batch
        if pa.types.is_list(column.type):
            ends = column.offsets.to_numpy()[ends]
            column = column.values
        columns[name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), column)
    return pa.table(columns)


@dataclass(frozen=True)
class Position:
    """Where a micro-batch stands in its stage: epoch, and step within the epoch."""

    epoch: int
    step: int


def stream(
    corpus_dir: str, plan: Plan, *, lane: int, epochs: int, start: Position, prefetch: int
) -> Iterator[tuple[Position, pa.Table]]:
    """Micro-batches of one lane from `start` to the last epoch, as one-row tables (`deal_window`).

    Runs in a process that is connected to Ray. prefetch: micro-batches held ready.
    """
    windows = [
        window
        for epoch in range(start.epoch, epochs)
        for window in plan.windows(epoch, lane)
        if epoch > start.epoch or window.first_step + window.steps > start.step
    ]
    if not windows:
        return
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [pa.table({"window": [i]}) for i in range(len(windows))]

    def deal(row: pa.Table) -> pa.Table:
        return deal_window(corpus_dir, plan, windows[row["window"][0].as_py()])

    dataset = ray.data.from_arrow(rows).map_batches(
        deal, batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    positions = (Position(w.epoch, w.first_step + step) for w in windows for step in range(w.steps))
    batches = dataset.iterator().iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch)
    for position, batch in zip(positions, batches, strict=True):
        if position.epoch > start.epoch or position.step >= start.step:
            yield position, batch


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
    """The tensors of a one-row table of `deal_window`."""
    column = {name: row[name].combine_chunks().flatten().to_numpy() for name in row.column_names}
    offsets = np.concatenate([[0], np.cumsum(column["length"])])
    text_id_B = column["text_id"]
    variant_B = draw_variants(
        text_id_B, variants=texts.variants, short_share=short_share, seed=seed, epoch=epoch
    )
    index_B = texts.index(text_id_B)
    return MicroBatch(
        cells=Packed.from_offsets(column["tokens"], offsets),
        soma_joinid_B=torch.from_numpy(column["soma_joinid"].copy()),
        text_id_B=torch.from_numpy(text_id_B.copy()),
        term_B=torch.from_numpy(texts.term[index_B]),
        text_row_B=torch.from_numpy(index_B * texts.variants + variant_B),
        short_B=torch.from_numpy(variant_B > 0),
    )
