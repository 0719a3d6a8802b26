"""A Census becomes a corpus: obs, then the counts, then the manifest.

Everything that obs alone decides (texts, splits, slices) is settled on the driver before a count is
read: at 100M cells that is about 40 bytes a cell. The counts are then read three times, twice for beta
over the train cells and once for the tokens of all (`passes`); with `beta.source` only once.

What is whole is never made again: a whole corpus with the recipe asked for is returned as it stands, and
of one that was interrupted every slice with a report, and beta, are kept. `unfinished/` holds what tells
them from another recipe's; it goes when the manifest stands.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.cells.options import BetaOptions, TokenOptions
from langcell.cells.vocabulary import Vocabulary
from langcell.census.options import CensusOptions
from langcell.census.source import Census, Slice, make_slices
from langcell.corpus import texts as text_table
from langcell.corpus.manifest import (
    Block,
    File,
    Manifest,
    corpus_hash,
    count_blocks,
    library_versions,
    refuse_other,
)
from langcell.corpus.options import CorpusOptions
from langcell.corpus.passes import Encoder, SliceReport, report_name, train_beta, write_tokens
from langcell.corpus.schema import SPLITS
from langcell.corpus.splits import assign_splits, check_split_options, split_columns
from langcell.corpus.storage import absolute, digest, digest_json, open_root, read_file, sizes, write_file
from langcell.corpus.texts import Texts, describe_obs, text_columns, write_texts
from langcell.errors import InputError
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

STATE = "unfinished/state.json"
OWN_BETA = "unfinished/beta.parquet"
BETA, VOCABULARY = "beta.parquet", "vocabulary.json"


@dataclass(frozen=True)
class PrepareSummary:
    """What stands in the corpus, and what it took.

    cells, tokens: of all splits; splits: cells of each; genes: genes that can stand in a sentence;
    texts: distinct ones; dropped: cells without such a gene, which are in no block; slices: read tasks,
    of which `skipped` were whole before; seconds: wall time; beta_hash, corpus_hash: hex.
    """

    cells: int
    genes: int
    texts: int
    tokens: int
    seconds: float
    beta_hash: str
    skipped: int
    slices: int
    dropped: int
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
    _check(tokens, corpus)
    corpus = replace(corpus, dir=absolute(corpus.dir))
    ontology = Ontology.load(text)
    given_beta = Beta.load(beta.source) if beta.source else None
    given_vocabulary = Vocabulary.load(tokens.vocabulary) if tokens.vocabulary else None
    with Census.open(census) as source:
        recipe: dict[str, Any] = {
            "census": source.release,
            "corpus": {
                "split_by": corpus.split_by,
                "test_share": corpus.test_share,
                "val_share": corpus.val_share,
                "split_seed": corpus.split_seed,
                "row_group_cells": corpus.row_group_cells,
                "slice_nnz": census.slice_nnz,
            },
            "eval": {
                "held_out_types": sorted(held_out_types),
                "held_out_datasets": sorted(held_out_datasets),
            },
            "text": {
                "facets": text.facets,
                "define": text.define,
                "short_variants": text.short_variants,
                "ontologies": ontology.versions,
            },
            "beta": given_beta.hash if given_beta else "of the train split",
            "tokens": {
                "max_length": tokens.max_length,
                "vocabulary": given_vocabulary.hash if given_vocabulary else "of the corpus",
            },
        }
        if Manifest.exists(corpus.dir):
            manifest = Manifest.read(corpus.dir)
            refuse_other(manifest.recipe, recipe, corpus.dir)
            return _summary(manifest, corpus.dir, started, skipped=manifest.counts["slices"])
        columns = [*text_columns(text), *split_columns(corpus, held_out_datasets)]
        obs, var = source.obs(columns), source.var()

    split = assign_splits(obs, corpus, held_out_types, held_out_datasets)
    texts, text_of_cell, coverage = describe_obs(obs, ontology, text)
    term = pa.array(texts.term_index[text_of_cell] + 1, pa.int32())
    cells = pa.table(
        {
            "soma_joinid": obs["soma_joinid"],
            "raw_sum": obs["raw_sum"],
            "nnz": obs["nnz"],
            "text_id": texts.text_id[text_of_cell],
            "term": pa.DictionaryArray.from_arrays(term, ["", *texts.terms]),
            "split": split,
        }
    )
    selection = _digest_cells(cells)
    slices = make_slices(cells, census.slice_nnz)
    root = open_root(corpus.dir)
    _begin(root, corpus.dir, recipe, selection)

    medians = given_beta or _own_beta(root, source, var, slices)
    vocabulary = given_vocabulary or Vocabulary.from_beta(medians)
    encoder = _encoder(medians, vocabulary, var, slices, tokens, corpus)
    whole = _whole_slices(root, slices)
    todo = [part for part in slices if part.index not in whole]
    made = write_tokens(source.options, var.num_rows, todo, encoder)
    reports = [*whole.values(), *made]

    dropped = np.array(sorted(joinid for report in reports for joinid in report.dropped), np.int64)
    kept = ~np.isin(cells["soma_joinid"].to_numpy(), dropped)
    texts = texts.count(text_of_cell[kept], split[kept])
    blocks = sorted((b for r in reports for b in r.blocks), key=lambda b: (SPLITS.index(b.split), b.file))
    counts = count_blocks(blocks)
    if sum(counts["cells"].values()) + len(dropped) != cells.num_rows:
        raise RuntimeError(
            f"{counts['cells']} cells in blocks and {len(dropped)} dropped, but {cells.num_rows} in obs"
        )
    if not counts["cells"]["train"]:
        raise InputError("No train cell has a gene of the vocabulary; give another tokens.vocabulary.")
    manifest = Manifest(
        hash=corpus_hash(recipe, selection, medians.hash, vocabulary.hash),
        recipe=recipe,
        recipe_hash=digest_json(recipe),
        beta_hash=medians.hash,
        vocabulary_hash=vocabulary.hash,
        ontologies=ontology.versions,
        counts=counts
        | {"texts": len(texts), "genes": encoder.genes, "dropped": len(dropped), "slices": len(slices)},
        coverage=coverage.to_dict(),
        blocks=blocks,
        files=_write_tables(root, texts, medians, vocabulary),
        versions=library_versions(),
    )
    manifest.write(root)
    _sweep(root, blocks)
    return _summary(manifest, corpus.dir, started, skipped=len(whole))


def _check(tokens: TokenOptions, corpus: CorpusOptions) -> None:
    check_split_options(corpus)
    if tokens.max_length < 2:
        raise InputError(f"tokens.max_length is {tokens.max_length}; `<cls>` and one gene are 2 tokens.")
    if corpus.row_group_cells < 1:
        raise InputError(f"corpus.row_group_cells is {corpus.row_group_cells}; it must be 1 cell at least.")


def _begin(root: fs.FileSystem, dir: str, recipe: dict[str, Any], selection: str) -> None:
    """Make the folders; refuse an interrupted corpus that is not this one."""
    state = {"recipe": recipe, "cells": selection}
    try:
        for folder in ("unfinished", *(f"blocks/{split}" for split in SPLITS)):
            root.create_dir(folder, recursive=True)
        if sizes(root, [STATE]) == [None]:
            write_file(root, STATE, json.dumps(state).encode())
    except OSError as error:
        raise InputError(f"corpus.dir: {dir} cannot be written: {error}") from error
    there = json.loads(read_file(root, STATE))
    refuse_other({**there["recipe"], "cells": there["cells"]}, {**recipe, "cells": selection}, dir)


def _own_beta(root: fs.FileSystem, source: Census, var: pa.Table, slices: list[Slice]) -> Beta:
    """The medians of the train split, kept so that an interrupted run need not read X for them again."""
    if sizes(root, [OWN_BETA]) == [None]:
        _write_beta(root, train_beta(source.options, var, slices, source.release), OWN_BETA)
    return Beta.read(OWN_BETA, root)


def _write_beta(root: fs.FileSystem, medians: Beta, name: str) -> None:
    medians.write("unfinished/beta.tmp", root)
    root.move("unfinished/beta.tmp", name)


def _encoder(
    medians: Beta,
    vocabulary: Vocabulary,
    var: pa.Table,
    slices: list[Slice],
    tokens: TokenOptions,
    corpus: CorpusOptions,
) -> Encoder:
    """Medians and tokens in the order of var. Raises InputError where no gene has both."""
    feature_id = var["feature_id"].to_pylist()
    median_of = dict(zip(medians.feature_id, medians.beta, strict=True))
    encoder = Encoder(
        beta_by_var=np.array([median_of.get(gene, np.nan) for gene in feature_id], np.float64),
        token_by_var=vocabulary.tokens_of(feature_id),
        cls=vocabulary.cls,
        max_length=tokens.max_length,
        cells_of_slice={part.index: len(part.cells) for part in slices},
        row_group_cells=corpus.row_group_cells,
        dir=corpus.dir,
    )
    if not encoder.genes:
        raise InputError(
            f"None of the {len(feature_id)} genes of the Census ({feature_id[0]}, ...) has a median and a "
            "token: beta.source or tokens.vocabulary is of other gene ids."
        )
    return encoder


def _whole_slices(root: fs.FileSystem, slices: list[Slice]) -> dict[int, SliceReport]:
    """Reports of the slices that an interrupted run finished, by index."""
    names = [report_name(part.index) for part in slices]
    found = [name for name, size in zip(names, sizes(root, names), strict=True) if size]
    reports = [SliceReport.from_json(read_file(root, name)) for name in found]
    return {report.slice: report for report in reports}


def _write_tables(root: fs.FileSystem, texts: Texts, medians: Beta, vocabulary: Vocabulary) -> list[File]:
    """Write the three small tables; what the manifest says of them."""
    write_file(root, text_table.NAME, write_texts(texts))
    write_file(root, VOCABULARY, vocabulary.to_json().encode())
    _write_beta(root, medians, BETA)
    data = {name: read_file(root, name) for name in (BETA, VOCABULARY, text_table.NAME)}
    return [File(name, len(content), digest(content)) for name, content in data.items()]


def _sweep(root: fs.FileSystem, blocks: list[Block]) -> None:
    """Delete what dead workers left among the blocks, and the state of the run."""
    known = {block.file for block in blocks}
    for info in root.get_file_info(fs.FileSelector("blocks", recursive=True)):
        if info.type == fs.FileType.File and info.path not in known:
            root.delete_file(info.path)
    root.delete_dir("unfinished")


def _digest_cells(cells: pa.Table) -> str:
    """Digest of the selected cells, their text, term and split."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in cells.column_names:
        column = cells[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            hashed.update("\n".join(column.dictionary.to_pylist()).encode())
            column = column.indices
        hashed.update(column.to_numpy().tobytes())
    return hashed.hexdigest()


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
        dropped=counts["dropped"],
        splits=counts["cells"],
        corpus_hash=manifest.hash,
        dir=dir,
    )
