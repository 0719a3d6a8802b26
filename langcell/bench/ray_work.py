"""The passes and the whole `prepare` through Ray, on a Ray of so many CPUs of its own.

A pass over a few slices a CPU comes first and is not measured: it starts the workers, which import and load
compiled kernels for some seconds. Every repetition writes a corpus of its own.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from langcell.bench.processes import Family, Work, watched
from langcell.bench.work import Cells, make_folders
from langcell.cells.options import BetaOptions, TokenOptions
from langcell.census.datasource import SliceSource
from langcell.census.reading import counts_block, counts_bytes
from langcell.census.slices import Slice
from langcell.census.source import open_source
from langcell.corpus.beta_pass import train_beta
from langcell.corpus.ledger import Ledger
from langcell.corpus.options import CorpusOptions
from langcell.corpus.prepare import prepare
from langcell.corpus.token_pass import BlockWriter, Encoder, write_tokens
from langcell.text.options import TextOptions


@dataclass(frozen=True)
class Passed:
    """What came of a pass, and what this process and all of Ray took for it."""

    value: Any
    family: Family


def beta_pass(cells: Cells, cpus: int) -> Work:
    """`train_beta`; the hash of the medians."""
    ledger = _start(cells, cpus)

    def run(parts: list[Slice]) -> str:
        return train_beta(cells.reader, 1, cells.var, parts, ledger, {}).beta.hash

    run(cells.slices[: 2 * cpus])
    return _watch(lambda: run(cells.slices))


def token_pass(cells: Cells, encoder: Encoder, directory: str, cpus: int) -> Work:
    """`write_tokens`; the tokens written."""
    ledger = _start(cells, cpus)
    folders = (str(Path(directory) / str(number)) for number in itertools.count())

    def run(parts: list[Slice]) -> int:
        folder = next(folders)
        make_folders(folder)
        source = SliceSource(partial(counts_block, cells.reader, 1), parts, counts_bytes)
        writer = BlockWriter(folder, "benchmark", CorpusOptions().row_group_cells, attempts=1)
        reports = write_tokens(source, encoder, writer, ledger.add)
        return sum(block.tokens for report in reports for block in report.blocks)

    run(cells.slices[: 2 * cpus])
    return _watch(lambda: run(cells.slices))


def whole_prepare(cells: Cells, corpus: CorpusOptions, cpus: int) -> Work:
    """`prepare` with all that comes before and after the passes; its summary."""
    beta_pass(cells, cpus)
    folders = (str(Path(corpus.dir) / str(number)) for number in itertools.count())

    def run() -> Any:
        own = CorpusOptions(dir=next(folders), test_share=corpus.test_share, val_share=corpus.val_share)
        return prepare(cells.census, BetaOptions(), TokenOptions(), TextOptions(), own, [], [])

    return _watch(run)


def _start(cells: Cells, cpus: int) -> Ledger:
    """A Ray of this process, and what takes the faults of cells (there are none)."""
    start_ray(cpus)
    return Ledger(open_source(cells.census), cells.census.bad_cells, 0)


def start_ray(cpus: int) -> None:
    """A quiet Ray of this process, with so many CPUs."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _watch(run: Callable[[], Any]) -> Work:
    def work() -> Passed:
        with watched() as family:
            value = run()
        return Passed(value, family)

    return work
