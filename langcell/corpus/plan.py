"""The order of cells: a pure function of (seed, epoch, corpus, global batch, micro-batch).

Not of the number of workers: an epoch is dealt to V = G / B *lanes*, and a rank owns lanes, so that
any number of ranks up to V sees the same micro-batches. An epoch is the concatenation of the train
row groups in seeded order, cut to whole global batches (the tail is dropped and counted). A round
is V consecutive windows of M x B cells, one a lane; inside a window cells are shuffled and dealt
into micro-batches of exactly B cells and near-equal token counts, since the slowest rank sets the
step time.

A plan holds row counts only, never cells: 27.5M cells in row groups of 128 are 6,900 files and 215,000
integers. It travels to every task that deals a round, so only these are pickled; what follows from
them is cached as arrays, and dealing a round costs one permutation of its epoch's row groups (10 ms).

Shape suffixes: F files, R row groups, C cells of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from langcell.errors import InputError


@dataclass(frozen=True)
class Position:
    """Where a step stands in its stage: epoch, and step within the epoch."""

    epoch: int
    step: int


@dataclass(frozen=True)
class RowGroups:
    """The Parquet row groups of one file of a split: file (relative to the corpus), rows of each."""

    file: str
    rows: tuple[int, ...]


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


class Epoch:
    """The order of one epoch: the row groups of `plan`, permuted, and windows over their concatenation."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch
        self._group_R = np.random.default_rng([plan.seed, epoch]).permutation(len(plan.rows_R))
        self._ends_R = np.cumsum(plan.rows_R[self._group_R])

    def window(self, round: int, lane: int) -> Window:
        """What a lane reads in a round (0 <= round < plan.rounds)."""
        plan, steps = self.plan, self.plan.steps_of(round)
        size = len(steps) * plan.micro_batch
        start = steps.start * plan.global_batch + lane * size
        spans = tuple(self._spans(start, start + size))
        return Window(self.epoch, round, lane, steps.start, len(steps), spans)

    def _spans(self, start: int, stop: int) -> Iterator[Span]:
        """Positions [start, stop) of the concatenated row groups, as spans."""
        first, last = np.searchsorted(self._ends_R, [start, stop - 1], side="right")
        group = self._group_R[first : last + 1]
        begin = self._ends_R[first : last + 1] - self.plan.rows_R[group]
        starts = np.maximum(start - begin, 0)
        stops = np.minimum(stop - begin, self.plan.rows_R[group])
        file = np.searchsorted(self.plan.first_F, group, side="right") - 1
        index = group - self.plan.first_F[file]  # among the file's
        for f, i, first_row, end_row in zip(
            *(each.tolist() for each in (file, index, starts, stops)), strict=True
        ):
            groups = self.plan.row_groups[f]
            yield Span(groups.file, i, first_row, end_row)


@dataclass(frozen=True)
class Plan:
    """The order of one split's cells.

    row_groups: of each file, in manifest order; seed; global_batch G, micro_batch B (cells); window_steps M;
    corpus_hash: of the manifest, so that a checkpoint knows its corpus.
    """

    row_groups: tuple[RowGroups, ...]
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

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is cached follows from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def rows_R(self) -> np.ndarray:
        """Rows of every row group in manifest order (int64 [R])."""
        return np.fromiter((rows for groups in self.row_groups for rows in groups.rows), np.int64)

    @cached_property
    def first_F(self) -> np.ndarray:
        """Number of each file's first row group among all (int64 [F])."""
        counts = [len(groups.rows) for groups in self.row_groups]
        return np.cumsum([0, *counts])[:-1]

    @property
    def lanes(self) -> int:
        """V: micro-batches of a step over all ranks."""
        return self.global_batch // self.micro_batch

    @cached_property
    def cells(self) -> int:
        return int(self.rows_R.sum())

    @property
    def steps(self) -> int:
        """Whole global batches of an epoch."""
        return self.cells // self.global_batch

    @property
    def rounds(self) -> int:
        """Rounds of an epoch; the last may be shorter than M steps."""
        return -(-self.steps // self.window_steps)

    @property
    def dropped(self) -> int:
        """Cells of an epoch's tail that fill no global batch."""
        return self.cells % self.global_batch

    @cached_property
    def hash(self) -> str:
        """Identity of the order (hex)."""
        groups = [
            (groups.file, index, rows) for groups in self.row_groups for index, rows in enumerate(groups.rows)
        ]
        numbers = [self.seed, self.global_batch, self.micro_batch, self.window_steps]
        content = json.dumps([self.corpus_hash, groups, numbers])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def steps_of(self, round: int) -> range:
        """The steps in the epoch that a round serves."""
        first = round * self.window_steps
        return range(first, min(first + self.window_steps, self.steps))

    def round(self, epoch: int, round: int, lanes: Sequence[int]) -> tuple[Window, ...]:
        """The windows of these lanes in one round."""
        order = Epoch(self, epoch)
        return tuple(order.window(round, lane) for lane in lanes)

    def windows(self, epoch: int, lane: int) -> Iterator[Window]:
        """The windows of one lane in one epoch, in order."""
        order = Epoch(self, epoch)
        return (order.window(round, lane) for round in range(self.rounds))

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
