"""beta over the train cells, on all the CPUs of a Ray cluster: two passes over X, reduced as trees.

Exact and independent of the schedule because both passes return partial results that merge by addition:
a task that Ray runs again replaces its result, where an increment pushed into an actor would count twice.
(Over the same cells Ray Data's `groupby.aggregate(Quantile)` reaches 290 cells/s.)

A histogram of all genes grows to some 350 MB at 27.5M cells, so a slice's partial is cut into `RANGES`
ranges of genes, each a tree of its own: a merge holds 8 x 22 MB and their sum at that size, about a slice.
Eight partials of a level make one of the next as they arrive, and no more than two slices a CPU are in
flight, so that the object store holds a few partials a level however many thousand slices there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from langcell.cells.beta import Beta
from langcell.cells.medians import (
    Histogram,
    collect,
    finish,
    gene_ranges,
    histogram,
    join_bins,
    median_bins,
    merge_collected,
    merge_histograms,
)
from langcell.census.reading import JudgedCells, read_cells
from langcell.census.slices import Reader, Slice
from langcell.corpus.ledger import Ledger, SliceFaults
from langcell.corpus.progress import Progress
from langcell.corpus.schema import TRAIN
from langcell.corpus.tasks import plainly, task
from langcell.errors import InputError

RANGES = 16
"""Ranges of genes that are reduced apart (more, where a range would have more than 32,768 genes)."""
FAN = 8
"""Partials that a merge takes."""

T = TypeVar("T")


@dataclass(frozen=True)
class TrainBeta:
    """beta, and the slices (indices) that could not be read and have no part in it."""

    beta: Beta
    unreadable: list[int]


def train_beta(
    reader: Reader,
    attempts: int,
    var: pa.Table,
    slices: list[Slice],
    ledger: Ledger,
    about: dict[str, str],
) -> TrainBeta:
    """Non-zero medians of the normalised counts over the train cells of `slices`.

    var: genes in column order (feature_id, feature_name). Slice cells have `split`. ledger: takes the cells
    that cannot be used, or raises InputError for them. about: where the cells come from, for the artefact.
    """
    train = [part for part in slices if pc.any(pc.equal(part.cells["split"], TRAIN)).as_py()]
    shared, ranges = ray.put(reader), gene_ranges(var.num_rows, RANGES)

    def histogram_of(part: Slice, reader: Reader) -> tuple[Any, ...]:
        part = _train_part(part)
        cells = read_cells(reader, part, attempts)
        return *histogram(*cells.sound, ranges), _faults(part, cells)

    def collect_of(part: Slice, reader: Reader, bins: Any) -> tuple[Any, ...]:
        part = _train_part(part)
        cells = read_cells(reader, part, attempts)
        return *collect(*cells.sound, bins, ranges), _faults(part, cells)

    unreadable: set[int] = set()
    while True:
        forest = [Tree(task(merge_parts).remote) for _ in ranges[1:]]
        counted, first = _reduce(histogram_of, forest, train, ledger, "beta: histogram", shared)
        bins = [task(median_bins).remote(part) for part in counted]
        joined = task(lambda *parts: join_bins(parts)).remote(*bins)
        forest = [Tree(task(lambda *parts: merge_collected(parts)).remote) for _ in ranges[1:]]
        collected, second = _reduce(collect_of, forest, train, ledger, "beta: medians", shared, joined)
        lost = [{faults.slice for faults in found if faults.unreadable} for found in (first, second)]
        unreadable |= lost[0] | lost[1]
        if {part.index for part in train} <= unreadable:
            raise InputError("census: no slice with train cells can be read.")
        if lost[0] == lost[1]:
            break  # else storage failed between the passes: these slices shall have a part in neither
        train = [part for part in train if part.index not in unreadable]
    n_train = sum(map(_n_train, train))
    about = about | {"cells": str(n_train - sum(len(faults.fault) for faults in second))}
    finished = [task(finish).remote(c, b, d) for c, b, d in zip(counted, bins, collected, strict=True)]
    with plainly():
        return TrainBeta(own_beta(ray.get(finished), var, about), sorted(unreadable))


def own_beta(parts: list[tuple[np.ndarray, np.ndarray]], var: pa.Table, about: dict[str, str]) -> Beta:
    """The artefact, from the numbers of values and the medians of each range of genes."""
    n_nonzero, median = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    about = {"method": "exact median of the non-zero normalised counts (float32)", "error_bound": "0"} | about
    return Beta(var["feature_id"].to_pylist(), var["feature_name"].to_pylist(), n_nonzero, median, about)


def _train_part(part: Slice) -> Slice:
    """The slice without the cells of other splits."""
    cells = part.cells.filter(pc.equal(part.cells["split"], TRAIN))
    return replace(part, cells=cells, nnz=pc.sum(cells["nnz"]).as_py())


def _n_train(part: Slice) -> int:
    return pc.sum(pc.equal(part.cells["split"], TRAIN)).as_py()


def _faults(part: Slice, cells: JudgedCells) -> SliceFaults:
    return SliceFaults.of(part.index, part.cells["soma_joinid"].to_numpy(), cells.fault, cells.reason)


def merge_parts(*parts: Histogram) -> Histogram:
    """The sum of some partials of the first pass."""
    return merge_histograms(parts)


class Tree(Generic[T]):
    """Partials of a range of genes on their way to one: `FAN` of a level make one of the next.

    merge: the sum of its arguments; T: a partial, or a reference to one.
    """

    def __init__(self, merge: Callable[..., T]) -> None:
        self._levels: list[list[T]] = [[]]
        self._merge = merge

    def add(self, partial: T, level: int = 0) -> None:
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(partial)
        if len(self._levels[level]) == FAN:
            merged = self._merge(*self._levels[level])
            self._levels[level] = []
            self.add(merged, level + 1)

    def sum(self) -> T:
        """All that was added, small partials first."""
        carried: list[T] = []
        for level in self._levels:
            parts = [*carried, *level]
            carried = [self._merge(*parts)] if len(parts) > 1 else parts
        return carried[0]


def _reduce(
    of_slice: Callable[..., tuple[Any, ...]],
    trees: list[Tree[ray.ObjectRef]],
    slices: list[Slice],
    ledger: Ledger,
    title: str,
    *shared: ray.ObjectRef,
) -> tuple[list[ray.ObjectRef], list[SliceFaults]]:
    """What the trees make of `of_slice(slice, *shared)` over all slices (at least one), as objects in the
    store, and the faults that were found."""

    # Partials stay in the store; the last value of a task is small and tells of its end.
    leaf = task(of_slice, num_returns=len(trees) + 1)
    waiting, running = list(reversed(slices)), dict[ray.ObjectRef, tuple[Slice, list[ray.ObjectRef]]]()
    found: list[SliceFaults] = []
    with Progress(title, len(slices)) as progress:
        while waiting or running:
            in_flight = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < in_flight:
                part = waiting.pop()
                *partials, end = leaf.remote(part, *shared)
                running[end] = part, partials
            (end,), _ = ray.wait(list(running), num_returns=1)
            with plainly():
                faults = ray.get(end)
            if len(faults.fault):
                ledger.add(faults)
                found.append(faults)
            part, partials = running.pop(end)
            for tree, partial in zip(trees, partials, strict=True):
                tree.add(partial)
            progress.add(_n_train(part))
    return [tree.sum() for tree in trees], found
