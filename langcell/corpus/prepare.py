"""A Census becomes a corpus: obs, then the counts, then the manifest.

What obs alone decides is settled on the driver (`draft`). The counts are then read three times, twice for
beta over the train cells (`beta_pass`) and once for the tokens of all (`token_pass`); with `beta.source`
only once, and sentences that others made only once.

What is whole is never made again: a whole corpus with the recipe asked for is returned as it stands, and
of one that was interrupted every slice with a report, and beta, are kept. `unfinished/` holds what tells
them from another recipe's; it goes when the manifest stands.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyarrow import fs

from langcell.cells.options import BetaOptions, TokenOptions
from langcell.census.datasource import SliceSource
from langcell.census.options import CensusOptions
from langcell.census.slices import Slice
from langcell.corpus import ledger as skipped_table
from langcell.corpus import texts as text_table
from langcell.corpus.draft import Draft, Order, draft, place_order
from langcell.corpus.ledger import Ledger
from langcell.corpus.manifest import (
    FORMAT,
    Block,
    File,
    Manifest,
    corpus_hash,
    count_blocks,
    library_versions,
    refuse_other,
)
from langcell.corpus.options import CorpusOptions
from langcell.corpus.roads import Road, take_road
from langcell.corpus.schema import SPLITS
from langcell.corpus.texts import Texts, write_texts
from langcell.corpus.token_pass import BlockWriter, SliceReport, report_name, write_tokens
from langcell.errors import InputError
from langcell.storage import digest, digest_json, open_root, read_file, sizes, write_file
from langcell.text.options import TextOptions

STATE = "unfinished/state.json"
BETA, VOCABULARY = "beta.parquet", "vocabulary.json"


@dataclass(frozen=True)
class PrepareSummary:
    """What stands in the corpus, and what it took.

    cells, tokens: of all splits; splits: cells of each; genes: genes that can stand in a sentence;
    texts: distinct ones; left_out: cells that are in no block, by fault (`skipped.parquet` lists them);
    slices: read tasks, of which `skipped` were whole before; seconds: wall time; beta_hash, corpus_hash:
    hex.
    """

    cells: int
    genes: int
    texts: int
    tokens: int
    seconds: float
    beta_hash: str
    skipped: int
    slices: int
    left_out: dict[str, int]
    genes_left_out: dict[str, int]
    splits: dict[str, int]
    corpus_hash: str
    dir: str


def prepare(
    census: CensusOptions,
    beta: BetaOptions,
    tokens: TokenOptions,
    text: TextOptions,
    corpus: CorpusOptions,
    held_out_types: list[str],
    held_out_datasets: list[str],
) -> PrepareSummary:
    """Make the corpus in `corpus.dir`, or find it there. The process must be connected to Ray.

    held_out_types: CL ids or labels; held_out_datasets: dataset ids. Raises InputError for whatever the
    user can mend, among it a folder that holds another corpus or a damaged one.
    """
    started = time.monotonic()
    with place_order(census, beta, tokens, text, corpus, held_out_types, held_out_datasets) as order:
        dir = order.corpus.dir
        try:
            whole_already = Manifest.exists(dir)
        except OSError as error:
            raise InputError(f"corpus.dir: {dir} cannot be read: {error}") from error
        if whole_already:
            manifest = Manifest.read(dir)
            refuse_other(manifest.recipe, order.recipe, dir)
            if manifest.counts["left_out"] and census.bad_cells == "error":
                raise InputError(
                    f"corpus.dir: the corpus in {dir} was made with census.bad_cells skip and lacks "
                    f"{manifest.counts['left_out']} cells (skipped.parquet). Say --census.bad_cells skip to "
                    "use it, or mend the data and choose another --corpus.dir."
                )
            _sweep(open_root(dir), manifest.blocks)  # a run that was killed at its very end did not
            return _summary(manifest, dir, started, skipped=manifest.counts["slices"])
        drafted = draft(order)
        root = open_root(dir)
        _begin(root, dir, order.recipe, drafted.selection)
        ledger = Ledger(order.source, census.bad_cells, census.most_unreadable * drafted.cells.num_rows)
        road = take_road(order, drafted, root, ledger)
        whole = _whole_slices(root, drafted.slices, road.made_with, ledger)
        todo = [part for part in drafted.slices if part.index not in whole.keys() | road.lost]
        writer = BlockWriter(dir, road.made_with, order.corpus.row_group_cells, census.attempts)
        source = SliceSource(road.block_of, todo, road.bytes_of)
        made = write_tokens(source, road.encode, writer, ledger.add)
        manifest = _manifest(order, drafted, road, [*whole.values(), *made], ledger, root)
        manifest.write(root)
        _sweep(root, manifest.blocks)
        return _summary(manifest, dir, started, skipped=len(whole))


def _begin(root: fs.FileSystem, dir: str, recipe: dict[str, Any], selection: str) -> None:
    """Make the folders; refuse an interrupted corpus that is not this one."""
    state = {"format": FORMAT, "recipe": recipe, "cells": selection}
    try:
        for folder in ("unfinished", *(f"blocks/{split}" for split in SPLITS)):
            root.create_dir(folder, recursive=True)
        if sizes(root, [STATE]) == [None]:
            write_file(root, STATE, json.dumps(state).encode())
    except OSError as error:
        raise InputError(f"corpus.dir: {dir} cannot be written: {error}") from error
    there = json.loads(read_file(root, STATE))
    if there.get("format") != FORMAT:
        raise InputError(f"corpus.dir: {dir} holds an interrupted corpus of another version; delete it.")
    refuse_other({**there["recipe"], "cells": there["cells"]}, {**recipe, "cells": selection}, dir)


def _whole_slices(
    root: fs.FileSystem, slices: list[Slice], made_with: str, ledger: Ledger
) -> dict[int, SliceReport]:
    """Reports of the slices that an interrupted run finished, by index; their faults go to the ledger.

    Not whole is a slice that was made with other medians (those of a run that had to leave slices out), and
    where faults are refused, one that had a fault: the data may have been mended since.
    """
    names = [report_name(part.index) for part in slices]
    found = [name for name, size in zip(names, sizes(root, names), strict=True) if size]
    reports = [SliceReport.from_json(read_file(root, name)) for name in found]
    reports = [report for report in reports if report.made_with == made_with]
    if ledger.strict:
        reports = [report for report in reports if not len(report.faults.fault)]
    for report in reports:
        ledger.add(report.faults)
    return {report.slice: report for report in reports}


def _manifest(
    order: Order, drafted: Draft, road: Road, reports: list[SliceReport], ledger: Ledger, root: fs.FileSystem
) -> Manifest:
    """What stands in the corpus; its tables are written here.

    Raises RuntimeError if the cells in blocks and those left out are not those of obs.
    """
    cells = drafted.cells
    kept = ~np.isin(cells["soma_joinid"].to_numpy(), ledger.soma_joinid)
    texts = drafted.texts.count(drafted.text_of_cell[kept], cells["split"].to_numpy()[kept])
    blocks = sorted((b for r in reports for b in r.blocks), key=lambda b: (SPLITS.index(b.split), b.file))
    counts = count_blocks(blocks)
    if sum(counts["cells"].values()) != kept.sum():
        raise RuntimeError(
            f"{counts['cells']} cells in blocks and {(~kept).sum()} left out, but {len(kept)} in obs"
        )
    if not counts["cells"]["train"]:
        raise InputError(
            f"No train cell is left ({ledger.counts} are left out): mend the data, or give another "
            "tokens.vocabulary."
        )
    return Manifest(
        hash=corpus_hash(
            order.recipe, drafted.selection, ledger.digest, road.beta.hash, road.vocabulary.hash
        ),
        recipe=order.recipe,
        recipe_hash=digest_json(order.recipe),
        beta_hash=road.beta.hash,
        vocabulary_hash=road.vocabulary.hash,
        ontologies=order.ontology.versions,
        counts=counts
        | {
            "texts": len(texts),
            "genes": road.genes,
            "left_out": ledger.counts,
            "genes_left_out": _genes_left_out(order, drafted),
            "slices": len(drafted.slices),
        },
        coverage=drafted.coverage.to_dict() | {"source": order.source.remarks},
        blocks=blocks,
        files=_write_tables(root, texts, road, ledger),
        versions=library_versions(),
    )


def _genes_left_out(order: Order, drafted: Draft) -> dict[str, int]:
    """Genes that can stand in no sentence whatever the vocabulary, by reason; columns of all files."""
    remarks = order.source.remarks
    of_files = {
        name: sum(remarks.get(name, {}).values()) for name in ("genes_duplicated", "genes_without_id")
    }
    return {
        "duplicated": len(drafted.duplicated) + of_files["genes_duplicated"],
        "without_id": of_files["genes_without_id"],
    }


def _write_tables(root: fs.FileSystem, texts: Texts, road: Road, ledger: Ledger) -> list[File]:
    """Write the small tables; what the manifest says of them."""
    road.beta.write(f"{BETA}.tmp", root)
    data = {
        BETA: read_file(root, f"{BETA}.tmp"),
        VOCABULARY: road.vocabulary.to_json().encode(),
        text_table.NAME: write_texts(texts),
        skipped_table.NAME: ledger.write(),
    }
    for name, content in data.items():
        write_file(root, name, content)
    root.delete_file(f"{BETA}.tmp")
    return [File(name, len(content), digest(content)) for name, content in data.items()]


def _sweep(root: fs.FileSystem, blocks: list[Block]) -> None:
    """Delete what dead workers left among the blocks, and the state of the run."""
    if root.get_file_info("unfinished").type == fs.FileType.NotFound:
        return
    known = {block.file for block in blocks}
    for info in root.get_file_info(fs.FileSelector("blocks", recursive=True)):
        if info.type == fs.FileType.File and info.path not in known:
            root.delete_file(info.path)
    root.delete_dir("unfinished")


def _summary(manifest: Manifest, dir: str, started: float, skipped: int) -> PrepareSummary:
    counts = manifest.counts
    return PrepareSummary(
        cells=manifest.cells,
        genes=counts["genes"],
        texts=counts["texts"],
        tokens=sum(counts["tokens"].values()),
        seconds=round(time.monotonic() - started, 3),
        beta_hash=manifest.beta_hash,
        skipped=skipped,
        slices=counts["slices"],
        left_out=counts["left_out"],
        genes_left_out=counts["genes_left_out"],
        splits=counts["cells"],
        corpus_hash=manifest.hash,
        dir=dir,
    )
