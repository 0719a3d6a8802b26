"""The benchmark of the data road: Census -> beta -> tokens -> Parquet, beside a plain read and beside others.

Four headline rows, each ours over a baseline on the same cells in the same run (ratio > 1: ours is better):
- `token_kernel`: counts in RAM to tokens, against LangCell's dense loop, cells per CPU second of one thread;
- `soma_to_parquet`: a Census on disk to token blocks, without Ray, against the blockwise road of the
  GeneformerTokenizer of cellxgene-census (which writes nothing), cells per CPU second;
- `read_bound`: the token pass through Ray on all the CPUs asked for, against reading X in one stream a CPU
  and dropping it, cells per second: 1 is what no pass can exceed;
- `beta`: exact medians from RAM, against `numpy.median` gene by gene, non-zeros per CPU second.

CPU seconds where one thread works: they depend little on what else the machine does. Every cell of the
generated Census is read (no filter), so that none is read only to be dropped. 25,424 genes are tokens, as
many as Geneformer's, the most frequent. Sentences and medians of ours and theirs are compared, and a
difference ends the benchmark: what is not the same is not faster.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from langcell.bench import records, work
from langcell.bench.figures import Figures, Size, pass_rates, rates, row, stage_rates, table
from langcell.bench.options import DataOptions
from langcell.bench.processes import afresh, alone, together
from langcell.bench.ray_work import beta_pass, token_pass, whole_prepare
from langcell.bench.work import Cells
from langcell.cells.beta import Beta
from langcell.cells.options import BetaOptions, TokenOptions
from langcell.cells.vocabulary import FIRST_GENE
from langcell.census.experiment import Census
from langcell.census.layout import ORGANISM
from langcell.census.options import CensusOptions
from langcell.census.slices import BAND
from langcell.census.synthetic import build_synthetic
from langcell.corpus.draft import draft, place_order
from langcell.corpus.forecast import task_mb
from langcell.corpus.options import CorpusOptions
from langcell.corpus.tasks import ONE_ARENA
from langcell.corpus.token_pass import Encoder
from langcell.errors import InputError
from langcell.text.options import TextOptions

GENES = 25_424
"""Genes that are tokens, as many as in Geneformer's dictionary."""

RAM_CELLS = 51_200
"""Most cells of the medians from RAM (the first ones), for NumPy's take 40 bytes a non-zero."""


def run(options: DataOptions) -> Figures:
    """Measure, print a table, write summary.json in `options.dir`; what stands there.

    Raises InputError for options that cannot be, RuntimeError if ours and a baseline's results differ.
    """
    _check(options)
    directory = Path(os.path.abspath(options.dir))
    directory.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    os.environ.update(ONE_ARENA)  # as jobs have it: what is measured is started from here on
    os.environ["TQDM_DISABLE"] = "1"  # inherited by what is measured; read when tqdm is imported
    uri = alone(build, str(directory), options.cells, options.seed).values[0]
    with tempfile.TemporaryDirectory(prefix="corpora-", dir=directory) as scratch:
        summary = _Benchmark(uri, options, Path(scratch)).measure()
    summary["details"]["load_average_before"] = load
    records.publish("data", options, summary, table(summary))
    return summary


def build(directory: str, cells: int, seed: int) -> work.Work:
    """The generated Census; its path."""
    return lambda: build_synthetic(directory, cells, seed)


class _Benchmark:
    """One run over the generated Census at `uri`; corpora are written into `scratch`."""

    def __init__(self, uri: str, options: DataOptions, scratch: Path) -> None:
        self.options, self.scratch, self.repeats = options, scratch, options.repeats
        self.corpus = CorpusOptions(
            dir=str(scratch), test_share=0, val_share=0
        )  # every pass takes every cell
        self.cells = cells_of(uri, self.corpus, CensusOptions().slice_nnz)
        self.size = Size(self.cells.n_cells, self.cells.nnz, _bytes(uri))
        self.some = self.cells.first(options.baseline_cells)
        self.of_some = Size(self.some.n_cells, self.some.nnz, 0)
        self.in_ram = self.cells.first(RAM_CELLS)

    def measure(self) -> Figures:
        """All figures, headline rows first."""
        raw, by_slice = self._raw_read(), self._raw_read_by_slice()
        beta_road, beta = self._beta_road()
        encoder = encoder_of(beta)
        token_road, road, blockwise = self._token_road(encoder)
        kernel, loops = self._kernel(encoder)
        medians, numpy_medians = self._medians()
        passes = self._passes(beta, encoder)
        most = str(max(self.options.cpus))
        tokens, floor = passes["token pass"][most], raw[most]
        return {
            "token_kernel": row(kernel, loops["langcell"], "cells_per_cpu_s", "cells/cpu-s"),
            "soma_to_parquet": row(road, blockwise, "cells_per_cpu_s", "cells/cpu-s"),
            "read_bound": row(tokens, floor, "cells_per_s", f"cells/s, {most} CPUs", "worker_peak_mb"),
            "beta": row(medians, numpy_medians, "nnz_per_cpu_s", "non-zeros/cpu-s"),
            "details": {
                "corpus": dataclasses.asdict(self.size)
                | {"genes": len(self.cells.var), "tokens": encoder.genes, "slices": len(self.cells.slices)},
                "baseline_corpus": dataclasses.asdict(self.of_some),
                "raw_read": raw,
                "raw_read_by_slice": by_slice,
                "beta_road": beta_road,
                "token_road": token_road,
                "soma_to_parquet": {"ours": road, "blockwise": blockwise},
                "kernels": {"ours": kernel, **loops},
                "medians": {"ours": medians, "numpy": numpy_medians},
                "passes": passes,
                "task_bound_mb": task_mb(max(part.nnz for part in self.cells.slices)),
            },
        }

    def _raw_read(self) -> Figures:
        """X in one stream a CPU, by number of CPUs."""
        found = {}
        for n in self.options.cpus:
            bands = np.linspace(0, -(-self.size.cells // BAND), n + 1).round().astype(int)
            ends = np.minimum(bands * BAND, self.size.cells).tolist()
            streams = [(self.cells, [part]) for part in pairwise(ends) if part[0] < part[1]]
            found[str(n)] = rates(together(work.RawRead, streams, self.repeats, n), self.size, n)
            _note(f"raw read, CPUs: {n}", found[str(n)])
        return found

    def _raw_read_by_slice(self) -> Figures:
        """X in as many reads as there are slices, on one CPU."""
        done = alone(work.RawRead, self.cells, self.cells.ranges, repeats=self.repeats)
        found = rates(done, self.size)
        _note("raw read, slice by slice", found)
        return found

    def _beta_road(self) -> tuple[Figures, Beta]:
        """Both beta passes in one process."""
        done = alone(work.beta_road, self.cells, repeats=self.repeats)
        found = stage_rates([stages for _, stages in done.values], self.size, done.peak_mb)
        _note("beta, without Ray", found)
        return found, done.values[0][0]

    def _token_road(self, encoder: Encoder) -> tuple[Figures, Figures, Figures]:
        """The token pass in one process: of all cells; of those that the blockwise road takes; and that."""
        done = alone(work.token_road, self.cells, encoder, str(self.scratch / "all"), repeats=self.repeats)
        whole = stage_rates(done.values, self.size, done.peak_mb)
        folder = self.scratch / "some"
        done = alone(work.token_road, self.some, encoder, str(folder), repeats=self.repeats)
        ours = stage_rates(done.values, self.of_some, done.peak_mb)
        theirs = alone(work.blockwise_road, self.some, encoder, False, repeats=self.repeats)
        checked = alone(work.blockwise_road, self.some, encoder, True)
        differing = count_differing(sentences_of(folder), checked.values[0])
        baseline = rates(theirs, self.of_some) | {"differing_cells": differing}
        _note("tokens, without Ray", whole)
        _note("tokens, blockwise", baseline)
        return whole, ours, baseline

    def _kernel(self, encoder: Encoder) -> tuple[Figures, dict[str, Figures]]:
        """Counts in RAM to tokens: ours, and the loops of others by name."""
        stored = str(self.scratch / "cells.npz")
        alone(work.save_cells, self.some, stored)
        done = afresh(work.kernel, stored, encoder, repeats=self.repeats)
        ours = rates(done, self.of_some)
        _note("kernel", ours)
        offsets, tokens = done.values[0]
        sentences = np.split(tokens, offsets[1:-1])
        loops = {}
        for name, function, options in (
            ("langcell", "dense_loop", {}),
            ("langcell_in_chunks", "dense_loop", {"chunk": 512}),
            ("geneformer", "sparse_loop", {}),
        ):
            timed = afresh(work.loop, function, stored, encoder, False, options, repeats=self.repeats)
            checked = alone(work.loop, function, stored, encoder, True, options)
            differing = count_differing(sentences, checked.values[0])
            loops[name] = rates(timed, self.of_some) | {"differing_cells": differing}
            _note(f"kernel, {name}", loops[name])
        return ours, loops

    def _medians(self) -> tuple[Figures, Figures]:
        """Medians from RAM, ours and NumPy's."""
        stored, size = str(self.scratch / "all.npz"), Size(self.in_ram.n_cells, self.in_ram.nnz, 0)
        alone(work.save_cells, self.in_ram, stored)
        both = [afresh(r, stored, repeats=self.repeats) for r in (work.own_medians, work.numpy_medians)]
        if not np.array_equal(both[0].values[0], both[1].values[0], equal_nan=True):
            raise RuntimeError("the medians are not those of numpy.median")
        ours, theirs = (rates(done, size) for done in both)
        _note("medians", ours)
        _note("medians, numpy", theirs)
        return ours, theirs

    def _passes(self, beta: Beta, encoder: Encoder) -> dict[str, dict[str, Figures]]:
        """The passes and all of `prepare` through Ray, by name and number of CPUs."""
        found: dict[str, dict[str, Figures]] = {"beta pass": {}, "token pass": {}, "prepare": {}}
        for n in self.options.cpus:
            own = dataclasses.replace(self.corpus, dir=str(self.scratch / f"prepare-{n}"))
            tokens = str(self.scratch / f"tokens-{n}")
            runs = {
                "beta pass": alone(beta_pass, self.cells, n, repeats=self.repeats, cpus=n),
                "token pass": alone(token_pass, self.cells, encoder, tokens, n, repeats=self.repeats, cpus=n),
                "prepare": alone(whole_prepare, self.cells, own, n, repeats=self.repeats, cpus=n),
            }
            hashes = {passed.value for passed in runs["beta pass"].values}
            hashes |= {passed.value.beta_hash for passed in runs["prepare"].values}
            if hashes != {beta.hash}:
                raise RuntimeError(f"medians of other bits: {hashes} through Ray, {beta.hash} without")
            for name, done in runs.items():
                found[name][str(n)] = pass_rates(done, self.size, n)
                _note(f"{name}, CPUs: {n}", found[name][str(n)])
        return found


def cells_of(uri: str, corpus: CorpusOptions, slice_nnz: int) -> Cells:
    """All cells of the Census at `uri`, in slices, with their texts and splits."""
    census = CensusOptions(uri=uri, filter="", slice_nnz=slice_nnz)
    with place_order(census, BetaOptions(), TokenOptions(), TextOptions(), corpus, [], []) as order:
        drafted = draft(order)
        assert drafted.var is not None
        assert isinstance(order.source, Census)
        return Cells(census, order.source.reader, drafted.var, drafted.slices)


def encoder_of(beta: Beta) -> Encoder:
    """An encoder whose tokens are the most frequent genes of the corpus, in the order of var."""
    order = np.argsort(-beta.n_nonzero, kind="stable")
    genes = np.sort(order[: min(GENES, int((beta.n_nonzero > 0).sum()))])
    token_by_var = np.zeros(len(order), np.uint16)
    token_by_var[genes] = np.arange(FIRST_GENE, FIRST_GENE + len(genes))
    cls = FIRST_GENE + len(genes)
    return Encoder(beta.beta.astype(np.float64), token_by_var, cls, TokenOptions().max_length)


def count_differing(ours: list[np.ndarray], theirs: list[np.ndarray]) -> int:
    """0. Raises RuntimeError if the sentences of some cells are not the same."""
    differing = sum(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if differing:
        raise RuntimeError(f"{differing} of {len(ours)} cells have other tokens than the baseline gives them")
    return differing


def sentences_of(folder: Path) -> list[np.ndarray]:
    """The sentences of a corpus's train blocks, in the order of joinids."""
    found = pq.read_table(folder / "blocks" / "train").sort_by("soma_joinid")
    tokens = found["tokens"].combine_chunks()
    return np.split(tokens.flatten().to_numpy(), tokens.offsets.to_numpy()[1:-1])


def _bytes(uri: str) -> int:
    """Bytes of X/raw on disk."""
    x_raw = Path(uri) / "census_data" / ORGANISM / "ms" / "RNA" / "X" / "raw"
    return sum(file.stat().st_size for file in x_raw.rglob("*") if file.is_file())


def _check(options: DataOptions) -> None:
    for name in ("cells", "baseline_cells", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; it must be 1 at least.")
    there = len(os.sched_getaffinity(0))
    if not options.cpus or not all(1 <= n <= there for n in options.cpus):
        raise InputError(
            f"--cpus is {options.cpus}; each must lie between 1 and {there}, the CPUs there are."
        )


def _note(name: str, found: Figures) -> None:
    rate = f"{found['cells_per_s']:10,.0f} cells/s" if "cells_per_s" in found else " " * 18
    print(f"{name:28}{rate}{found['cells_per_cpu_s']:10,.0f} cells/cpu-s", file=sys.stderr, flush=True)
