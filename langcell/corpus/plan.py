"""The order of cells: a pure function of (seed, epoch, corpus, global batch, micro-batch).

Not of the number of workers: an epoch is dealt to V = G / B *lanes*, and a rank owns lanes, so that
any number of ranks up to V sees the same micro-batches. An epoch is the concatenation of the train
row groups in seeded order, cut to whole global batches (the tail is dropped and counted). A round
is V consecutive windows of M x B cells, one a lane; inside a window cells are shuffled and dealt
into micro-batches of exactly B cells and near-equal token counts, since the slowest rank sets the
step time. A plan holds row counts only, never cells: 27.5M cells in row groups of 4,096 are 6,714
integers.

Shape suffixes: R row groups, C cells of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from langcell.errors import InputError


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group of a split: file (relative to the corpus), its index there, its rows."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one row group."""

    file: str
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """What one lane reads in one round: spans of row groups that hold `steps` micro-batches."""

    epoch: int
    round: int
    lane: int
    first_step: int
    """Step in the epoch of the window's first micro-batch."""
    steps: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Plan:
    """The order of one split's cells.

    row_groups: in manifest order; seed; global_batch G, micro_batch B (cells); window_steps M;
    corpus_hash: of the manifest, so that a checkpoint knows its corpus.
    """

    row_groups: tuple[RowGroup, ...]
    seed: int
    global_batch: int
    micro_batch: int
    window_steps: int
    corpus_hash: str = ""

    def __post_init__(self) -> None:
        if self.global_batch % self.micro_batch:
            raise InputError(
                f"train.global_batch ({self.global_batch}) is no multiple of "
                f"train.micro_batch ({self.micro_batch})"
            )

    @property
    def lanes(self) -> int:
        """V: micro-batches of a step over all ranks."""
        return self.global_batch // self.micro_batch

    @property
    def cells(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def steps(self) -> int:
        """Whole global batches of an epoch."""
        return self.cells // self.global_batch

    @property
    def dropped(self) -> int:
        """Cells of an epoch's tail that fill no global batch."""
        return self.cells % self.global_batch

    @property
    def hash(self) -> str:
        """Identity of the order (hex)."""
        groups = [(g.file, g.index, g.rows) for g in self.row_groups]
        numbers = [self.seed, self.global_batch, self.micro_batch, self.window_steps]
        content = json.dumps([self.corpus_hash, groups, numbers])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def windows(self, epoch: int, lane: int) -> Iterator[Window]:
        """The windows of one lane in one epoch, in order."""
        order_R = np.random.default_rng([self.seed, epoch]).permutation(len(self.row_groups))
        groups = [self.row_groups[i] for i in order_R]
        ends_R = np.cumsum([group.rows for group in groups])
        for index, first_step in enumerate(range(0, self.steps, self.window_steps)):
            steps = min(self.window_steps, self.steps - first_step)
            size = steps * self.micro_batch
            start = first_step * self.global_batch + lane * size
            spans = tuple(_spans(groups, ends_R, start, start + size))
            yield Window(epoch, index, lane, first_step, steps, spans)

    def deal(self, window: Window, lengths_C: np.ndarray) -> np.ndarray:
        """Rows of the window, shuffled and dealt: int64 [steps, B].

        lengths_C: tokens of the window's cells. Cells are taken in seeded random order, `steps` at a
        time; of each handful the longest goes to the lightest micro-batch. So every micro-batch is a
        random draw, and their loads differ by about one cell's spread of lengths.
        """
        shuffled_C = np.random.default_rng(
            [self.seed, window.epoch, window.round, window.lane, 1]
        ).permutation(len(lengths_C))
        dealt = np.empty((window.steps, self.micro_batch), dtype=np.int64)
        load = np.zeros(window.steps, dtype=np.int64)
        for column, handful in enumerate(shuffled_C.reshape(self.micro_batch, window.steps)):
            longest_first = handful[np.argsort(-lengths_C[handful], kind="stable")]
            lightest_first = np.argsort(load, kind="stable")
            dealt[lightest_first, column] = longest_first
            load[lightest_first] += lengths_C[longest_first]
        return dealt


def _spans(groups: list[RowGroup], ends_R: np.ndarray, start: int, stop: int) -> Iterator[Span]:
    """Positions [start, stop) of the concatenated row groups, as spans."""
    index = int(np.searchsorted(ends_R, start, side="right"))
    while start < stop:
        group, end = groups[index], int(ends_R[index])
        first = end - group.rows
        upto = min(stop, end)
        yield Span(group.file, group.index, start - first, upto - first)
        start, index = upto, index + 1
