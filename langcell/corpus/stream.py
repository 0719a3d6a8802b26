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
of the CPUs idle. The thread that schedules a stream lives in the worker, beside the step, and while blocks
wait for their consumer it never rests by itself (Ray 2.60; `Pace`). All three are set in the worker's own
DataContext.

Shape suffixes: C cells of a window, M its micro-batches, B cells of one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray.data
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from langcell.corpus.plan import Plan, Position, Window
from langcell.corpus.schema import BLOCK_SCHEMA
from langcell.storage import open_root

COLUMNS = ["soma_joinid", "text_id", "length", "tokens"]
FILES_AHEAD = 16
"""Row groups that a task fetches at once: a window's lie in as many files, each three requests on S3."""
LAP = 256
"""Rounds that a dataset has at most."""
REST_S = 0.02
"""Between two looks of a stream's scheduler at its tasks (s), one of which makes dozens of steps."""


class Pace(ExecutionCallback):
    """Makes a stream's scheduler rest between its looks.

    By itself it waits until some task has output, which one that backpressure holds back has all the time:
    the loop takes a core, and the interpreter's lock from the step (of a slow consumer's process 90% of a
    core, 13% with this).
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(REST_S)


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
    if Pace not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pace)
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
