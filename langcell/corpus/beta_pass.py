"""beta over the train cells, on all the CPUs of a Ray cluster: two passes over X, reduced as trees.

Exact and independent of the schedule because both passes return partial results that merge by addition:
a task that Ray runs again replaces its result, where an increment pushed into an actor would count twice.
Partials merge in pairs of equal size as they arrive, and no more than two tasks a CPU are in flight, so
that the object store holds a few dozen partials (a histogram grows to some 100 MB) however many thousand
slices there are. (Over the same cells Ray Data's `groupby.aggregate(Quantile)` reaches 290 cells/s.)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from tqdm import tqdm

from langcell.cells.beta import Beta, collect, finish, histogram, median_bins, merge_histograms
from langcell.census.reading import JudgedCells, read_cells
from langcell.census.slices import Reader, Slice
from langcell.corpus.ledger import Ledger, SliceFaults
from langcell.corpus.schema import TRAIN
from langcell.errors import InputError

RETRIES = 3
"""Times that a task whose worker died is run again; Ray Data's own default is for ever."""


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
    train = [part for part in map(_train_part, slices) if len(part.cells)]
    shared = ray.put(reader)

    def histogram_of(part: Slice, reader: Reader) -> tuple[Any, SliceFaults]:
        cells = read_cells(reader, part, attempts)
        return histogram(*cells.sound), _faults(part, cells)

    def collect_of(part: Slice, reader: Reader, bins: Any) -> tuple[Any, SliceFaults]:
        cells = read_cells(reader, part, attempts)
        return collect(*cells.sound, bins), _faults(part, cells)

    unreadable: set[int] = set()
    while True:
        counted, first = _reduce(histogram_of, train, ledger, "beta: histogram", shared)
        bins = _task(median_bins).remote(counted, var.num_rows)
        collected, second = _reduce(collect_of, train, ledger, "beta: medians", shared, bins)
        lost = [{faults.slice for faults in found if faults.unreadable} for found in (first, second)]
        unreadable |= lost[0] | lost[1]
        if {part.index for part in train} <= unreadable:
            raise InputError("census: no slice with train cells can be read.")
        if lost[0] == lost[1]:
            break  # else storage failed between the passes: these slices shall have a part in neither
        train = [part for part in train if part.index not in unreadable]
    n_cells = sum(len(part.cells) for part in train) - sum(len(faults.fault) for faults in second)
    ids, names = var["feature_id"].to_pylist(), var["feature_name"].to_pylist()
    about = about | {"cells": str(n_cells)}
    return TrainBeta(
        ray.get(_task(finish).remote(counted, bins, collected, ids, names, about)), sorted(unreadable)
    )


def _train_part(part: Slice) -> Slice:
    cells = part.cells.filter(pc.equal(part.cells["split"], TRAIN))
    return replace(part, cells=cells, nnz=pc.sum(cells["nnz"]).as_py() or 0)


def _faults(part: Slice, cells: JudgedCells) -> SliceFaults:
    return SliceFaults.of(part.index, part.cells["soma_joinid"].to_numpy(), cells.fault, cells.reason)


def _task(function: Callable[..., Any], num_returns: int = 1) -> Any:
    """`function` as a Ray task that is run again, a bounded number of times, when its worker dies."""
    return ray.remote(num_returns=num_returns, max_retries=RETRIES)(function)


def _reduce(
    of_slice: Callable[..., tuple[Any, SliceFaults]],
    slices: list[Slice],
    ledger: Ledger,
    title: str,
    *shared: ray.ObjectRef,
) -> tuple[ray.ObjectRef, list[SliceFaults]]:
    """The merged histograms of `of_slice(slice, *shared)` over all slices (at least one), as an object in
    the store, and the faults that were found."""

    # Each task returns its partial, which stays in the store, and what is small, which tells of its end.
    leaf = _task(of_slice, num_returns=2)
    pair = _task(lambda a, b: (merge_histograms([a, b]), None), num_returns=2)
    waiting, serial = list(reversed(slices)), itertools.count()
    running: dict[ray.ObjectRef, tuple[int, ray.ObjectRef]] = {}  # end -> level, partial
    done: list[tuple[int, int, ray.ObjectRef]] = []  # a heap by level, of about 2^level slices
    found: list[SliceFaults] = []
    with tqdm(total=len(slices), desc=title, unit="slice") as bar:
        while True:
            while len(done) > 1:
                (low, _, a), (level, _, b) = heapq.nsmallest(2, done)
                if low < level and (running or waiting):
                    break
                done = sorted(done)[2:]  # a sorted list is a heap
                merged, end = pair.remote(a, b)
                running[end] = (level + 1, merged)
            in_flight = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < in_flight:
                result, end = leaf.remote(waiting.pop(), *shared)
                running[end] = (0, result)
            if not running:
                return done[0][2], found
            (end,), _ = ray.wait(list(running), num_returns=1)
            faults = plainly(end)
            if faults is not None and len(faults.fault):
                ledger.add(faults)
                found.append(faults)
            level, result = running.pop(end)
            bar.update(level == 0)
            heapq.heappush(done, (level, next(serial), result))


def plainly(end: ray.ObjectRef) -> Any:
    """What a task returned. Raises InputError for what the user can mend, without a worker's traceback."""
    try:
        return ray.get(end)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise InputError(DIED) from error


DIED = (
    f"a worker that read a slice died {RETRIES + 1} times. Most likely its node has too little memory: lower "
    "--census.slice_nnz (--plan says how much memory a task takes), or use larger nodes. The same command "
    "goes on with what is whole."
)
