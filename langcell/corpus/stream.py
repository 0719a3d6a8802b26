"""Per-rank Ray Data streams of micro-batches.

Each training worker builds and consumes its own ordered stream: one row in is one round of its lanes, a
window each, rows out are micro-batches, step by step, lanes ascending. Reading, shuffling and dealing
run in Ray tasks on CPU nodes, ahead of the step; one stream serves all epochs of a stage, so that only
its first micro-batch waits for worker processes to start (2-18 s, against 0.5-2 s a stream per epoch).
A resume starts the stream at the right window; only a part of one window is read for nothing.

A row in is two numbers, its epoch and round, and a task derives the windows from the plan (20 ms at 27.5M
cells): windows of six such epochs would be gigabytes. Ray stores every row in as a block, 1-2 ms each before
the first step (5,000 of them: 5-16 s), so a long stage is several datasets of `LAP` rounds, one after the
other; a change takes 1-4 s in `LAP` x M steps.

Order is kept by Ray Data's `preserve_order`; its default reservation of resources would leave half
of the CPUs idle. Both are set in the worker's own DataContext.

Shape suffixes: C cells of a window, M its micro-batches, B cells of one, T their tokens, K distinct texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray.data
import torch
from ray.data import DataContext

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.corpus.plan import Plan, Position, Window
from langcell.corpus.schema import BLOCK_SCHEMA
from langcell.storage import open_root

COLUMNS = ["soma_joinid", "text_id", "length", "tokens"]
FILES_AHEAD = 16
"""Row groups that a task fetches at once: a window's lie in as many files, each three requests on S3."""
LAP = 256
"""Rounds that a dataset has at most."""


def read_cells(corpus_dir: str, window: Window) -> pa.Table:
    """The window's cells in plan order (columns `COLUMNS`)."""
    root, parquet = open_root(corpus_dir), pads.ParquetFileFormat()
    # A fragment each: the row groups of one fragment come in the file's order, not in the plan's.
    fragments = [
        parquet.make_fragment(span.file, filesystem=root, row_groups=[span.index]) for span in window.spans
    ]
    # One thread decodes, for the task has half a CPU; requests run beside it all the same.
    groups = pads.FileSystemDataset(fragments, BLOCK_SCHEMA, parquet, root).to_table(
        columns=COLUMNS, use_threads=False, fragment_readahead=FILES_AHEAD
    )
    # Spans are whole row groups, the first and the last excepted.
    return groups.slice(window.spans[0].start, sum(span.stop - span.start for span in window.spans))


def deal_window(corpus_dir: str, plan: Plan, window: Window) -> pa.Table:
    """The window's micro-batches, one a row: the lists soma_joinid, text_id, length and tokens."""
    cells = read_cells(corpus_dir, window)
    lengths_C = cells["length"].to_numpy()
    dealt_MB = plan.deal(window, lengths_C)
    # Longest first: cells of one length, a quarter of them cut at the context, are one run of attention.
    dealt_MB = np.take_along_axis(dealt_MB, np.argsort(-lengths_C[dealt_MB], axis=1, kind="stable"), axis=1)
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


def deal_round(corpus_dir: str, plan: Plan, windows: Sequence[Window]) -> pa.Table:
    """The micro-batches of one window a lane, interleaved: step by step, lanes in the order given."""
    dealt = pa.concat_tables([deal_window(corpus_dir, plan, window) for window in windows])
    if len(windows) == 1:
        return dealt
    return dealt.take(np.arange(len(dealt)).reshape(len(windows), -1).T.ravel())


def stream(
    corpus_dir: str, plan: Plan, *, lanes: Sequence[int], epochs: int, start: Position, prefetch: int
) -> Iterator[tuple[Position, pa.Table]]:
    """Steps from `start` to the last epoch, each with the micro-batches of `lanes`, one a row
    (`deal_window`).

    Runs in a process that is connected to Ray. prefetch: steps held ready.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    ahead = start.epoch * plan.rounds + start.step // plan.window_steps
    for first in range(ahead, epochs * plan.rounds, LAP):
        rounds = range(first, min(first + LAP, epochs * plan.rounds))
        for position, batch in _lap(corpus_dir, plan, lanes, rounds, prefetch):
            if position.epoch > start.epoch or position.step >= start.step:
                yield position, batch


def _lap(
    corpus_dir: str, plan: Plan, lanes: Sequence[int], rounds: range, prefetch: int
) -> Iterator[tuple[Position, pa.Table]]:
    """The steps of `rounds`, numbered through all epochs."""

    def deal(row: pa.Table) -> pa.Table:
        windows = plan.round(row["epoch"][0].as_py(), row["round"][0].as_py(), lanes)
        return deal_round(corpus_dir, plan, windows)

    places = [divmod(number, plan.rounds) for number in rounds]
    rows = [{"epoch": epoch, "round": round} for epoch, round in places]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        deal, batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    positions = (Position(epoch, step) for epoch, round in places for step in plan.steps_of(round))
    batches = dataset.iterator().iter_batches(
        batch_size=len(lanes), batch_format="pyarrow", prefetch_batches=prefetch
    )
    yield from zip(positions, batches, strict=True)


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
