"""Prepare a corpus: the first step of pretraining, and a job of its own for large ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from langcell.config import Config
from langcell.corpus.prepare import prepare
from langcell.corpus.storage import open_root, write_file
from langcell.recipes.session import connect

SUMMARY = "summary.json"


def run(config: Config) -> dict[str, Any]:
    """Join Ray and prepare the corpus of `config`; its summary, which also stands in summary.json there.

    Raises InputError for what the user can mend.
    """
    with connect(config.run):
        return prepare_corpus(config)


def prepare_corpus(config: Config) -> dict[str, Any]:
    """`run` in a process that is connected to Ray."""
    prepared = prepare(
        config.census,
        config.beta,
        config.tokens,
        config.text,
        config.corpus,
        config.eval.held_out_types,
        config.eval.held_out_datasets,
    )
    summary = dataclasses.asdict(prepared)
    write_file(open_root(prepared.dir), SUMMARY, json.dumps(summary, indent=1).encode())
    splits = ", ".join(f"{name} {cells:,}" for name, cells in prepared.splits.items())
    print(
        f"corpus   {prepared.dir}\n"
        f"         {prepared.cells:,} cells ({splits}), {prepared.genes:,} genes, {prepared.texts:,} texts, "
        f"{prepared.tokens:,} tokens; {prepared.skipped} of {prepared.slices} slices were there already",
        flush=True,
    )
    return summary
