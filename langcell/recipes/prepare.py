"""Prepare a corpus: the first step of pretraining, and a job of its own for large ones."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import AbstractContextManager
from typing import Any

from langcell.config import Config
from langcell.corpus.draft import Order, draft, place_order
from langcell.corpus.forecast import forecast
from langcell.corpus.manifest import Manifest
from langcell.corpus.prepare import prepare
from langcell.recipes.session import connect
from langcell.storage import open_root, sizes, write_file
from langcell.text.describe import coverage_lines

SUMMARY = "summary.json"


def run(config: Config) -> dict[str, Any]:
    """Join Ray and prepare the corpus of `config`; its summary. The one of the run that made the corpus, with
    what it took, stands in summary.json there.

    Raises InputError for what the user can mend.
    """
    with connect(config.run):
        return prepare_corpus(config)


def plan(config: Config) -> dict[str, Any]:
    """Say what `run` would take: obs is read, not a count, and nothing is written or started.

    Raises InputError as `run` does for what obs, var and the options tell.
    """
    with placed(config) as order:
        drafted = draft(order, plan_only=True)
        expected = forecast(order, drafted)
    print(coverage_lines(drafted.coverage.to_dict()))
    print(expected.lines(os.cpu_count() or 1), flush=True)
    return dataclasses.asdict(expected)


def placed(config: Config) -> AbstractContextManager[Order]:
    """The corpus that `config` asks for, open until the block ends. Raises InputError."""
    return place_order(*_asked(config))


def prepare_corpus(config: Config) -> dict[str, Any]:
    """`run` in a process that is connected to Ray."""
    prepared = prepare(*_asked(config))
    summary = dataclasses.asdict(prepared)
    _keep(summary, prepared.dir, made_here=prepared.skipped < prepared.slices)
    print(coverage_lines(Manifest.read(prepared.dir).coverage))
    splits = ", ".join(f"{name} {cells:,}" for name, cells in prepared.splits.items())
    left_out = ", ".join(f"{n:,} {fault}" for fault, n in prepared.left_out.items())
    print(
        f"corpus   {prepared.dir}\n"
        f"         {prepared.cells:,} cells ({splits}), {prepared.genes:,} genes, {prepared.texts:,} texts, "
        f"{prepared.tokens:,} tokens; {prepared.skipped} of {prepared.slices} slices were there already"
        + (f"\n         left out: {left_out} (skipped.parquet)" if left_out else ""),
        flush=True,
    )
    return summary


def _keep(summary: dict[str, Any], dir: str, *, made_here: bool) -> None:
    """Write summary.json, unless it tells of another run that made the corpus. Without it the corpus is whole
    all the same, so storage that may only be read is told and not an error."""
    root = open_root(dir)
    try:
        if made_here or sizes(root, [SUMMARY]) == [None]:
            write_file(root, SUMMARY, json.dumps(summary, indent=1).encode())
    except OSError as error:
        print(f"corpus   {SUMMARY} cannot be written to {dir}: {error}")


def _asked(config: Config) -> tuple[Any, ...]:
    return (
        config.census,
        config.beta,
        config.tokens,
        config.text,
        config.corpus,
        config.eval.held_out_types,
        config.eval.held_out_datasets,
    )
