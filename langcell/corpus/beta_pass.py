"""beta over the train cells, on all the CPUs of a Ray cluster: two passes over X, reduced as trees.

Exact and independent of the schedule because both passes return partial results that merge by addition:
a task that Ray runs again replaces its result, where an increment pushed into an actor would count twice.
(Over the same cells Ray Data's `groupby.aggregate(Quantile)` reaches 290 cells/s.)

A histogram of all genes grows to some 700 MB at 27.5M cells, so a slice's partial is cut into `RANGES`
ranges of genes, each a tree of its own: a merge holds 4 x 44 MB and their sum at that size, less than a
slice. Four partials of a level make one of the next as they arrive, and no more than two slices a CPU are
in flight, so that the object store holds a few partials a level however many thousand slices there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from tqdm import tqdm

from langcell.cells.beta import (
    Beta,
    Histogram,
    collect,
    finish,
    histogram,
    join_bins,
    median_bins,
    merge_histograms,
)
from langcell.census.reading import JudgedCells, read_cells
from langcell.census.slices import Reader, Slice
from langcell.corpus.ledger import Ledger, SliceFaults
from langcell.corpus.schema import TRAIN
from langcell.corpus.tasks import plainly, task
from langcell.errors import InputError

RANGES = 16
"""Ranges of genes that are reduced apart."""
FAN = 4
"""Partials that a merge takes."""


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
    shared, n_genes = ray.put(reader), var.num_rows

    def histogram_of(part: Slice, reader: Reader) -> tuple[Any, ...]:
        part = _train_part(part)
        cells = read_cells(reader, part, attempts)
        counted = histogram(*cells.sound)
        return *counted.by_gene_range(n_genes, RANGES, bits=16), _faults(part, cells)

    def collect_of(part: Slice, reader: Reader, bins: Any) -> tuple[Any, ...]:
        part = _train_part(part)
        cells = read_cells(reader, part, attempts)
        collected = collect(*cells.sound, bins)
        return *collected.by_gene_range(n_genes, RANGES, bits=32), _faults(part, cells)

    unreadable: set[int] = set()
    while True:
        counted, first = _reduce(histogram_of, train, ledger, "beta: histogram", shared)
        bins = [task(median_bins).remote(part, n_genes) for part in counted]
        joined = task(lambda *parts: join_bins(parts)).remote(*bins)
        collected, second = _reduce(collect_of, train, ledger, "beta: medians", shared, joined)
        lost = [{faults.slice for faults in found if faults.unreadable} for found in (first, second)]
        unreadable |= lost[0] | lost[1]
        if {part.index for part in train} <= unreadable:
            raise InputError("census: no slice with train cells can be read.")
        if lost[0] == lost[1]:
            break  # else storage failed between the passes: these slices shall have a part in neither
        train = [part for part in train if part.index not in unreadable]
    n_train = sum(pc.sum(pc.equal(part.cells["split"], TRAIN)).as_py() for part in train)
    ids, names = var["feature_id"].to_pylist(), var["feature_name"].to_pylist()
    about = about | {"cells": str(n_train - sum(len(faults.fault) for faults in second))}
    finished = [
        task(finish).remote(c, b, d, ids, names, about)
        for c, b, d in zip(counted, bins, collected, strict=True)
    ]
    with plainly():
        return TrainBeta(Beta.join(ray.get(finished)), sorted(unreadable))


def _train_part(part: Slice) -> Slice:
    """The slice without the cells of other splits."""
    cells = part.cells.filter(pc.equal(part.cells["split"], TRAIN))
    return replace(part, cells=cells, nnz=pc.sum(cells["nnz"]).as_py())


def _faults(part: Slice, cells: JudgedCells) -> SliceFaults:
    return SliceFaults.of(part.index, part.cells["soma_joinid"].to_numpy(), cells.fault, cells.reason)


def merge_parts(*parts: Histogram) -> Histogram:
    """The sum of some partials."""
    return merge_histograms(parts)


class _Tree:
    """Partials of a range of genes on their way to one: `FAN` of a level make one of the next."""

    def __init__(self) -> None:
        self._levels: list[list[ray.ObjectRef]] = [[]]
        self._merge = task(merge_parts)

    def add(self, partial: ray.ObjectRef, level: int = 0) -> None:
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(partial)
        if len(self._levels[level]) == FAN:
            merged = self._merge.remote(*self._levels[level])
            self._levels[level] = []
            self.add(merged, level + 1)

    def sum(self) -> ray.ObjectRef:
        """All that was added, small partials first."""
        carried: list[ray.ObjectRef] = []
        for level in self._levels:
            parts = [*carried, *level]
            carried = [self._merge.remote(*parts)] if len(parts) > 1 else parts
        return carried[0]


def _reduce(
    of_slice: Callable[..., tuple[Any, ...]],
    slices: list[Slice],
    ledger: Ledger,
    title: str,
    *shared: ray.ObjectRef,
) -> tuple[list[ray.ObjectRef], list[SliceFaults]]:
    """The merged histograms of `of_slice(slice, *shared)` over all slices (at least one) by range of genes,
    as objects in the store, and the faults that were found."""

    # Partials stay in the store; the last value of a task is small and tells of its end.
    leaf = task(of_slice, num_returns=RANGES + 1)
    waiting, running = list(reversed(slices)), dict[ray.ObjectRef, list[ray.ObjectRef]]()
    trees = [_Tree() for _ in range(RANGES)]
    found: list[SliceFaults] = []
    with tqdm(total=len(slices), desc=title, unit="slice") as bar:
        while waiting or running:
            in_flight = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < in_flight:
                *partials, end = leaf.remote(waiting.pop(), *shared)
                running[end] = partials
            (end,), _ = ray.wait(list(running), num_returns=1)
            with plainly():
                faults = ray.get(end)
            if len(faults.fault):
                ledger.add(faults)
                found.append(faults)
            for tree, partial in zip(trees, running.pop(end), strict=True):
                tree.add(partial)
            bar.update()
    return [tree.sum() for tree in trees], found
