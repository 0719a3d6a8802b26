"""The three passes over X, on all the CPUs of a Ray cluster: histogram, collect, tokens.

beta is exact and independent of the schedule because its two passes return partial results that merge
by addition and by sorted concatenation: a task that Ray runs again replaces its result, where an
increment pushed into an actor would count twice. Partials merge in pairs of equal size as they arrive,
and no more than two tasks a CPU are in flight, so that the object store holds a few dozen partials
(a histogram grows to some 100 MB) however many thousand slices there are.

The token pass is a Ray Data graph, read -> rank-encode and write, fused into one task a slice; rows out
are small reports. Its settings are measured: the default reservation of resources would leave half of
the CPUs idle (9.7k against 18.6k rows/s), and an unbounded block keeps a slice in one piece, for a piece
of a slice would be written over the other. A slice that always kills its worker is given up after
`RETRIES`, by default it would be retried forever; an exception (a timeout of S3) is retried as often, by
default never.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import scipy.sparse as sp
import tiledbsoma
from pyarrow import fs
from ray.data import DataContext
from ray.exceptions import RayTaskError
from ray.util.annotations import RayDeprecationWarning
from tqdm import tqdm

from langcell.cells.beta import (
    Beta,
    collect,
    finish,
    histogram,
    median_bins,
    merge_histograms,
)
from langcell.cells.normalize import check_counts
from langcell.cells.rank import rank_encode
from langcell.census.options import CensusOptions
from langcell.census.source import Slice, SomaSlices, block_to_csr, read_slice
from langcell.corpus.manifest import Block
from langcell.corpus.schema import BLOCK_ENCODING, BLOCK_SCHEMA, SPLITS, TRAIN, block_name
from langcell.corpus.storage import digest, open_root, write_file
from langcell.errors import InputError

RETRIES = 3


def train_beta(census: CensusOptions, var: pa.Table, slices: list[Slice], release: dict[str, str]) -> Beta:
    """Non-zero medians of the normalised counts over the train cells of `slices`.

    var: genes in column order (feature_id, feature_name). Slice cells have `split`. release: where the
    cells come from, for the artefact's metadata. Raises InputError for counts that are none.
    """
    n_train = {part.index: pc.sum(pc.equal(part.cells["split"], TRAIN)).as_py() for part in slices}
    slices = [part for part in slices if n_train[part.index]]
    n_vars = var.num_rows

    def histogram_of(part: Slice) -> Any:
        return histogram(*_read_train(census, n_vars, part))

    counted = _reduce(histogram_of, merge_histograms, slices, "beta: histogram")
    bins = _task(median_bins).remote(counted, n_vars)

    def collect_of(part: Slice, bins: Any) -> Any:
        return collect(*_read_train(census, n_vars, part), bins)

    collected = _reduce(collect_of, merge_histograms, slices, "beta: medians", bins)
    ids, names = var["feature_id"].to_pylist(), var["feature_name"].to_pylist()
    about = release | {"cells": str(sum(n_train.values()))}
    return ray.get(_task(finish).remote(counted, bins, collected, ids, names, about))


def _task(function: Callable[..., Any], num_returns: int = 1) -> Any:
    """`function` as a Ray task that is retried when a worker dies or a read fails."""
    options: dict[str, Any] = {
        "max_retries": RETRIES,
        "retry_exceptions": [OSError, RuntimeError, tiledbsoma.SOMAError],
    }
    return ray.remote(num_returns=num_returns, **options)(function)


def _read_train(census: CensusOptions, n_vars: int, part: Slice) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts and totals of the train cells of a slice."""
    cells = part.cells.filter(pc.equal(part.cells["split"], TRAIN))
    train = replace(part, cells=cells, nnz=pc.sum(cells["nnz"]).as_py())
    counts, totals = read_slice(census, n_vars, train), cells["raw_sum"].to_numpy()
    _check(counts, totals, cells["soma_joinid"].to_numpy())
    return counts, totals


def _check(counts: sp.csr_matrix, totals: np.ndarray, joinid: np.ndarray) -> None:
    try:
        check_counts(counts, totals)
    except InputError as error:
        raise InputError(f"Cells {joinid[0]} to {joinid[-1]} (soma_joinid): {error}") from None


def _reduce(
    of_slice: Callable[..., Any],
    merge: Callable[[list[Any]], Any],
    slices: list[Slice],
    title: str,
    *shared: ray.ObjectRef,
) -> ray.ObjectRef:
    """`merge` of `of_slice(slice, *shared)` over all slices (at least one), as an object in the store."""

    # Each task returns its partial, which stays in the store, and a None that tells of its end.
    leaf = _task(lambda part, *shared: (of_slice(part, *shared), None), num_returns=2)
    pair = _task(lambda a, b: (merge([a, b]), None), num_returns=2)
    waiting, serial = list(reversed(slices)), itertools.count()
    running: dict[ray.ObjectRef, tuple[int, ray.ObjectRef]] = {}  # end -> level, partial
    done: list[tuple[int, int, ray.ObjectRef]] = []  # a heap by level, of about 2^level slices
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
                return done[0][2]
            (end,), _ = ray.wait(list(running), num_returns=1)
            _raise_plainly(end)
            level, result = running.pop(end)
            bar.update(level == 0)
            heapq.heappush(done, (level, next(serial), result))


def _raise_plainly(end: ray.ObjectRef) -> None:
    """Raises what the task raised; the user's mistake without the traceback of a worker."""
    try:
        ray.get(end)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise


@dataclass(frozen=True)
class Encoder:
    """How a slice becomes token files.

    beta_by_var: float64 [n_vars]; token_by_var: uint16 [n_vars], 0 for none; cls: token;
    max_length: most tokens of a cell; cells_of_slice: cells by index of the slice; dir: the corpus.
    """

    beta_by_var: np.ndarray
    token_by_var: np.ndarray
    cls: int
    max_length: int
    cells_of_slice: dict[int, int]
    row_group_cells: int
    dir: str

    @property
    def genes(self) -> int:
        """Genes that can stand in a sentence: they have a token and a median."""
        return int(((self.token_by_var > 0) & (self.beta_by_var > 0)).sum())


@dataclass(frozen=True)
class SliceReport:
    """What came of a slice: its files, and the joinids of cells that have no gene of the vocabulary."""

    slice: int
    blocks: list[Block]
    dropped: list[int]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> SliceReport:
        content = json.loads(text)
        return cls(content["slice"], [Block(**b) for b in content["blocks"]], content["dropped"])


def report_name(slice_index: int) -> str:
    """Name of the report that a finished slice leaves until the corpus is whole."""
    return f"unfinished/slice-{slice_index:06d}.json"


def write_tokens(
    census: CensusOptions, n_vars: int, slices: list[Slice], encoder: Encoder
) -> list[SliceReport]:
    """Rank-encode every cell of `slices` and write the token blocks; the reports in any order.

    Slice cells have `text_id`, `term` and `split`. Raises InputError for counts that are none.
    """
    if not slices:
        return []
    context = DataContext.get_current().copy()
    context.op_resource_reservation_enabled = False
    context.target_max_block_size = None
    context.print_on_execution_start = False
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    with DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 has no other place for max_retries that leaves the two operators fused.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        rows = (
            ray.data.read_datasource(
                SomaSlices(census, n_vars, slices),
                override_num_blocks=len(slices),
                ray_remote_args={"max_retries": RETRIES},
            )
            .map_batches(
                functools.partial(encode_slice, encoder=encoder),
                batch_format="pyarrow",
                batch_size=None,
                max_retries=RETRIES,
            )
            .iter_rows()
        )
        reports = []
        for row in rows:
            if row["mistake"]:
                raise InputError(row["mistake"])
            reports.append(SliceReport.from_json(row["report"]))
    return reports


def encode_slice(table: pa.Table, encoder: Encoder) -> pa.Table:
    """Write the token files of one block of `SomaSlices`; one row with the report, or the user's mistake."""
    index = table["slice"][0].as_py()
    if table.num_rows != encoder.cells_of_slice[index]:
        raise RuntimeError(
            f"slice {index} came in pieces: {table.num_rows} of {encoder.cells_of_slice[index]} cells"
        )
    counts, totals = block_to_csr(table, len(encoder.beta_by_var)), table["raw_sum"].to_numpy()
    try:
        _check(counts, totals, table["soma_joinid"].to_numpy())
    except InputError as error:  # a mistake does not go away by retrying
        return pa.table({"report": [""], "mistake": [str(error)]})
    offsets, tokens = rank_encode(
        counts, totals, encoder.beta_by_var, encoder.token_by_var, encoder.cls, encoder.max_length
    )
    length = np.diff(offsets)
    cells = pa.table(
        [
            table["soma_joinid"],
            pa.ListArray.from_arrays(offsets.astype(np.int32), tokens, BLOCK_SCHEMA.field("tokens").type),
            length.astype(np.int32),
            table["text_id"],
            table["term"].cast(pa.string()),
        ],
        schema=BLOCK_SCHEMA,
    )
    split = table["split"].to_numpy()
    root, blocks = open_root(encoder.dir), []
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero((split == code) & (length > 1))
        if len(rows):
            blocks.append(_write_block(root, cells.take(rows), name, index, encoder.row_group_cells))
    dropped = table["soma_joinid"].to_numpy()[length <= 1].tolist()
    report = SliceReport(index, blocks, dropped).to_json()
    write_file(root, report_name(index), report.encode())
    return pa.table({"report": [report], "mistake": [""]})


def _write_block(root: fs.FileSystem, cells: pa.Table, split: str, index: int, row_group_cells: int) -> Block:
    sink = pa.BufferOutputStream()
    pq.write_table(cells, sink, row_group_size=row_group_cells, **BLOCK_ENCODING)
    data = sink.getvalue()
    name = block_name(split, index)
    write_file(root, name, data)
    whole, rest = divmod(cells.num_rows, row_group_cells)
    return Block(
        file=name,
        bytes=data.size,
        hash=digest(data),
        split=split,
        rows=cells.num_rows,
        row_groups=[row_group_cells] * whole + [rest] * (rest > 0),
        tokens=pc.sum(cells["length"]).as_py(),
    )
