"""What is measured: each function makes one piece of work ready, in the process that will do it.

Ready means opened, loaded and compiled, so that what is timed is the work alone. The roads without Ray call
the very functions that a task of the passes calls, and take the CPU time of each. Reading and placing into
the CSR happen batch by batch and cannot be timed apart: the read is measured alone over the same slices,
and the CSR (with its checks and its Arrow block) is what the reader takes beyond that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from langcell.bench import baselines
from langcell.bench.processes import Work
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
from langcell.cells.rank import rank_encode
from langcell.census.experiment import ExperimentReader
from langcell.census.opening import reading_x
from langcell.census.options import CensusOptions
from langcell.census.reading import counts_block, read_cells
from langcell.census.slices import Slice
from langcell.corpus.beta_pass import RANGES, Tree, own_beta
from langcell.corpus.options import CorpusOptions
from langcell.corpus.schema import SPLITS
from langcell.corpus.token_pass import BlockWriter, Encoder
from langcell.storage import open_root

FLOOR: dict[str, str | int] = {"soma.init_buffer_bytes": 4 << 20, "sm.mem.total_budget": 256 << 20}
"""Settings of the raw read, on top of the product's: 50k cells a CPU second in one range of 51,200, as fast
as any that were tried."""

Stages = dict[str, float]
"""CPU seconds by stage."""


@dataclass(frozen=True)
class Cells:
    """What is read, and how: the slices of a Census with text, term and split, var, and the reader that
    tasks are given."""

    census: CensusOptions
    reader: ExperimentReader
    var: pa.Table
    slices: list[Slice]

    @property
    def n_cells(self) -> int:
        return sum(len(part.cells) for part in self.slices)

    @property
    def nnz(self) -> int:
        return sum(part.nnz for part in self.slices)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Joinids [start, stop) of the slices."""
        return [(part.start, part.stop) for part in self.slices]

    def first(self, at_least: int) -> Cells:
        """The first slices that hold so many cells, or all."""
        ends = np.cumsum([len(part.cells) for part in self.slices])
        return replace(self, slices=self.slices[: int(np.searchsorted(ends, at_least)) + 1])


class RawRead:
    """Reads X/raw of some ranges of joinids [start, stop), and drops it: the floor of any reader.

    With the settings that read one long range fastest, whatever those of the product are.
    """

    def __init__(self, cells: Cells, ranges: list[tuple[int, int]]) -> None:
        self._open = reading_x(replace(cells.census, tiledb=FLOOR), cells.reader.x_uri)  # X closes with it
        self._x, self._n_vars, self._ranges = self._open.__enter__(), len(cells.var), ranges

    def __call__(self) -> int:
        """The entries that were read."""
        return sum(_count_entries(self._x, part, self._n_vars) for part in self._ranges)


def token_road(cells: Cells, encoder: Encoder, directory: str) -> Work:
    """The token pass without Ray, into the folders of a corpus; `read`, `csr`, `tokens` and `write`."""
    make_folders(directory)
    writer = BlockWriter(directory, "benchmark", CorpusOptions().row_group_cells, attempts=1)

    def road(parts: list[Slice]) -> Stages:
        spent: Counter[str] = Counter()
        for part in parts:
            table = _timed(spent, "csr", counts_block, cells.reader, 1, part)
            sentences = _timed(spent, "tokens", encoder, table)
            _timed(spent, "write", writer, table, *sentences)
        return dict(spent)

    road(cells.slices[:1])
    return lambda: _apart(_read_cpu_s(cells), road(cells.slices))


def beta_road(cells: Cells) -> Work:
    """Both beta passes without Ray; the medians, and `read`, `csr`, `histogram`, `collect`, `merge`."""

    def road(parts: list[Slice]) -> tuple[Beta, Stages]:
        spent: Counter[str] = Counter()

        def judged() -> Iterator[tuple[sp.csr_matrix, np.ndarray]]:
            for part in parts:
                yield _timed(spent, "csr", read_cells, cells.reader, part, 1).sound

        found = _medians(judged, len(cells.var), partial(_timed, spent))
        return own_beta([found], cells.var, {}), dict(spent)

    def work() -> tuple[Beta, Stages]:
        read = 2 * _read_cpu_s(cells)
        beta, stages = road(cells.slices)
        return beta, _apart(read, stages)

    road(cells.slices[:1])
    return work


def _medians(
    slices: Callable[[], Iterable[tuple[sp.csr_matrix, np.ndarray]]], n_vars: int, call: Callable[..., Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Number of values and median of each gene: both passes over `slices()`, by ranges and trees as in
    `corpus.beta_pass`. call: calls a stage's function, given the stage's name before it."""
    ranges = gene_ranges(n_vars, RANGES)

    def reduced(name: str, count: Callable[..., list[Histogram]], merge: Any, *known: Any) -> list[Histogram]:
        trees = [Tree(lambda *parts: call("merge", merge, parts)) for _ in ranges[1:]]
        for counts, totals in slices():
            for tree, own in zip(trees, call(name, count, counts, totals, *known, ranges), strict=True):
                tree.add(own)
        return [tree.sum() for tree in trees]

    counted = reduced("histogram", histogram, merge_histograms)
    bins = [call("merge", median_bins, part) for part in counted]
    collected = reduced("collect", collect, merge_collected, join_bins(bins))
    finished = [call("merge", finish, *of_range) for of_range in zip(counted, bins, collected, strict=True)]
    n, median = (np.concatenate(arrays) for arrays in zip(*finished, strict=True))
    return n, median


def save_cells(cells: Cells, path: str) -> Work:
    """Store the counts and totals of the slices, for measurements from RAM."""

    def work() -> None:
        read = [read_cells(cells.reader, part, 1) for part in cells.slices]
        counts = sp.vstack([judged.counts for judged in read], format="csr")
        np.savez(
            path,
            data=counts.data,
            indices=counts.indices.astype(np.int32),
            indptr=counts.indptr.astype(np.int32),
            totals=np.concatenate([judged.totals for judged in read]),
            ends=np.cumsum([len(judged.totals) for judged in read]),
            n_vars=counts.shape[1],
        )

    return work


def load_cells(path: str) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """What `save_cells` stored: counts, totals, and where each slice ends (rows)."""
    with np.load(path) as stored:
        arrays = (stored["data"], stored["indices"], stored["indptr"])
        shape = (len(stored["totals"]), int(stored["n_vars"]))
        return sp.csr_matrix(arrays, shape), stored["totals"], stored["ends"]


def kernel(path: str, encoder: Encoder) -> Work:
    """Our kernel from RAM, CSR to tokens; offsets and tokens."""
    counts, totals, _ = load_cells(path)

    def encode(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        how = (encoder.beta_by_var, encoder.token_by_var, encoder.cls, encoder.max_length)
        return rank_encode(counts[rows], totals[rows], *how)

    encode(slice(0, 64))
    return lambda: encode(slice(None))


def loop(name: str, path: str, encoder: Encoder, stable: bool, options: dict[str, Any]) -> Work:
    """A loop of `baselines` from RAM, by its name; its sentences, if `stable` (else they compare to none)."""
    counts, totals, _ = load_cells(path)
    function = getattr(baselines, name)

    def work() -> Any:
        sentences = function(counts, totals, encoder, stable, **options)
        return sentences if stable else None

    return work


def blockwise_road(cells: Cells, encoder: Encoder, stable: bool) -> Work:
    """The road of `baselines` from SOMA; its sentences, if `stable`."""
    uri, n_cells = str(cells.census.uri), cells.n_cells
    totals = np.concatenate([part.cells["raw_sum"].to_numpy() for part in cells.slices])

    def work() -> Any:
        sentences = baselines.blockwise_road(uri, n_cells, totals, encoder, stable)
        return sentences if stable else None

    return work


def own_medians(path: str) -> Work:
    """Our medians from RAM, slice by slice; float32 [genes]."""
    counts, totals, ends = load_cells(path)

    def untimed(_: str, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def medians(parts: list[tuple[sp.csr_matrix, np.ndarray]]) -> np.ndarray:
        return _medians(lambda: parts, counts.shape[1], untimed)[1]

    parts = [(counts[a:b], totals[a:b]) for a, b in pairwise([0, *ends.tolist()])]
    medians([(counts[:64], totals[:64])])
    return lambda: medians(parts)


def numpy_medians(path: str) -> Work:
    """`numpy.median` gene by gene from RAM; float32 [genes]."""
    counts, totals, _ = load_cells(path)
    return lambda: baselines.numpy_medians(counts, totals)


def make_folders(directory: str) -> None:
    """Make the folders of a corpus, as `prepare` does before its passes."""
    root = open_root(directory)
    for folder in ("unfinished", *(f"blocks/{split}" for split in SPLITS)):
        root.create_dir(folder, recursive=True)


def _timed(spent: Counter[str], name: str, function: Callable[..., Any], *args: Any) -> Any:
    started = time.process_time()
    value = function(*args)
    spent[name] += time.process_time() - started  # type: ignore[assignment]
    return value


def _count_entries(x_raw: soma.SparseNDArray, part: tuple[int, int], n_vars: int) -> int:
    rows, columns = slice(part[0], part[1] - 1), slice(0, n_vars - 1)  # ends of SOMA are inclusive
    return sum(len(batch) for batch in x_raw.read((rows, columns)).tables())


def _read_cpu_s(cells: Cells) -> float:
    """CPU seconds of reading every slice as the reader does, and nothing else."""
    started = time.process_time()
    for part in cells.ranges:
        with reading_x(cells.census, cells.reader.x_uri) as x_raw:
            _count_entries(x_raw, part, len(cells.var))
    return time.process_time() - started


def _apart(read: float, stages: Stages) -> Stages:
    """The stages of a road, its reading taken out of `csr`."""
    return {"read": read} | stages | {"csr": stages["csr"] - read}
