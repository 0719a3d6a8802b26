"""What a corpus will be, from obs alone: texts, splits, slices. Not a count is read for it.

The driver takes some 270 bytes a cell at its peak (27 GB at 100M; measured at 300k). What is wrong with a
filter, a split, a facet or the ontologies shows here, in minutes, before a task is started.
`jobs/prepare.py --plan` ends here and says what the rest would take.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from langcell.cells.beta import Beta
from langcell.cells.options import BetaOptions, TokenOptions
from langcell.cells.vocabulary import Vocabulary
from langcell.census.experiment import Census
from langcell.census.options import CensusOptions
from langcell.census.slices import Slice, Source, make_slices
from langcell.census.source import open_source
from langcell.census.tokenised import TokenisedFolder
from langcell.corpus.measuring import assume, measure
from langcell.corpus.options import CorpusOptions
from langcell.corpus.splits import assign_splits, check_split_options, split_columns
from langcell.corpus.texts import Texts, describe_obs, text_columns
from langcell.errors import InputError
from langcell.storage import absolute
from langcell.text.describe import Coverage
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions


@dataclass(frozen=True)
class Order:
    """A corpus as it was asked for: the options with their places resolved, what they name loaded."""

    source: Source | TokenisedFolder
    census: CensusOptions
    tokens: TokenOptions
    text: TextOptions
    corpus: CorpusOptions
    held_out_types: list[str]
    held_out_datasets: list[str]
    ontology: Ontology
    beta: Beta | None
    vocabulary: Vocabulary | None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that the corpus is a function of and that is known before obs is read, JSON values. (Made when
        it is asked for: the release of a folder holds the digests of its files.)"""
        census, corpus, text = self.census, self.corpus, self.text
        return {
            "census": self.source.release,
            "corpus": {
                "split_by": corpus.split_by,
                "test_share": corpus.test_share,
                "val_share": corpus.val_share,
                "split_seed": corpus.split_seed,
                "row_group_cells": corpus.row_group_cells,
                "slice_nnz": census.slice_nnz,
            },
            "eval": {
                "held_out_types": sorted(self.held_out_types),
                "held_out_datasets": sorted(self.held_out_datasets),
            },
            "text": {
                "facets": text.facets,
                "define": text.define,
                "short_variants": text.short_variants,
                "ontologies": self.ontology.versions,
            },
            "beta": self.beta.hash if self.beta else "of the train split",
            "tokens": {
                "max_length": self.tokens.max_length,
                "vocabulary": self.vocabulary.hash if self.vocabulary else "of the corpus",
            },
        }

    def made_with(self) -> tuple[Beta, Vocabulary]:
        """Medians and vocabulary of sentences that others made. Raises InputError unless both are given."""
        if self.beta is None or self.vocabulary is None:
            raise InputError(
                f"census.uri {self.census.uri} holds sentences of tokens: name the vocabulary "
                "(tokens.vocabulary) and the medians (beta.source) that they were made with, Geneformer's "
                "for LangCell's own."
            )
        if self.vocabulary.renumbered:
            raise InputError(
                f"tokens.vocabulary: the sentences of {self.census.uri} have the numbers of Geneformer V2, "
                "in which genes begin at 4; only those of V1 and LangCell can be read. Prepare the corpus "
                "from counts."
            )
        return self.beta, self.vocabulary


@contextmanager
def place_order(
    census: CensusOptions,
    beta: BetaOptions,
    tokens: TokenOptions,
    text: TextOptions,
    corpus: CorpusOptions,
    held_out_types: list[str],
    held_out_datasets: list[str],
) -> Iterator[Order]:
    """Check what can be checked before obs is read, and open the source until the block ends.

    held_out_types: CL ids or labels; held_out_datasets: dataset ids. Raises InputError.
    """
    check_split_options(corpus)
    if tokens.max_length < 2:
        raise InputError(f"tokens.max_length is {tokens.max_length}; `<cls>` and one gene are 2 tokens.")
    if corpus.row_group_cells < 1:
        raise InputError(f"corpus.row_group_cells is {corpus.row_group_cells}; it must be 1 cell at least.")
    ontology = Ontology.load(text, census.organism)
    medians = Beta.load(beta.source) if beta.source else None
    vocabulary = Vocabulary.load(tokens.vocabulary) if tokens.vocabulary else None
    source = open_source(census)
    try:
        order = Order(
            source,
            census,
            tokens,
            text,
            replace(corpus, dir=absolute(corpus.dir)),
            held_out_types,
            held_out_datasets,
            ontology,
            medians,
            vocabulary,
        )
        if isinstance(source, TokenisedFolder):
            order.made_with()
        yield order
    finally:
        source.close()


NO_GENES = pa.table({"feature_id": pa.array([], pa.string()), "feature_name": pa.array([], pa.string())})


@dataclass(frozen=True)
class Draft:
    """All that obs decides of a corpus.

    var: genes in column order, none where the cells are sentences already; cells: soma_joinid, raw_sum,
    nnz, text_id, term and split of every cell; texts: the distinct ones, text_of_cell: the index of each
    cell's (int64); coverage: what each facet resolved to; selection: digest of `cells`; lengths: how nnz is
    known, by obs (`told`), from X (`measured`), or for a plan not at all (`assumed`).
    """

    var: pa.Table
    cells: pa.Table
    texts: Texts
    text_of_cell: np.ndarray
    coverage: Coverage
    slices: list[Slice]
    selection: str
    lengths: Literal["told", "measured", "assumed"]

    @property
    def duplicated(self) -> list[str]:
        """Gene ids that stand more than once in var: no count of theirs can be told from the other's."""
        return [gene for gene, times in Counter(self.var["feature_id"].to_pylist()).items() if times > 1]


def draft(order: Order, *, plan_only: bool = False) -> Draft:
    """Read obs and var, and decide; `plan_only`: without a look at X, and without Ray.

    Raises InputError for whatever in them the user can mend.
    """
    columns = [*text_columns(order.text), *split_columns(order.corpus, order.held_out_datasets)]
    obs = order.source.obs(columns)
    expected = order.census.expected_cells
    if expected is not None and expected != obs.num_rows:
        raise InputError(
            f"census.filter {order.census.filter!r} matches {obs.num_rows:,} cells, census.expected_cells "
            f"says {expected:,}: another release or filter than the one that was pinned."
        )
    lengths: Literal["told", "measured", "assumed"] = "told"
    if isinstance(order.source, Census) and obs["nnz"].null_count:
        lengths = "assumed" if plan_only else "measured"
        obs = assume(obs) if plan_only else measure(order.source.reader, order.census.attempts, obs)
    var = NO_GENES if isinstance(order.source, TokenisedFolder) else order.source.var()
    texts, text_of_cell, coverage = describe_obs(obs, order.ontology, order.text)
    term = pa.DictionaryArray.from_arrays(
        pa.array(texts.term_index[text_of_cell] + 1, pa.int32()), ["", *texts.terms]
    )
    obs = obs.append_column("term", term)
    found = [order.ontology.find(name, ["CL"]) for name in order.held_out_types]
    held_out_types = [
        type.id if type and type.id in texts.terms else name
        for type, name in zip(found, order.held_out_types, strict=True)
    ]
    split = assign_splits(obs, order.corpus, held_out_types, order.held_out_datasets)
    cells = pa.table(
        {
            "soma_joinid": obs["soma_joinid"],
            "raw_sum": obs["raw_sum"],
            "nnz": obs["nnz"],
            "text_id": texts.text_id[text_of_cell],
            "term": term,
            "split": split,
        }
    )
    drafted = Draft(
        var,
        cells,
        texts,
        text_of_cell,
        coverage,
        make_slices(cells, order.census.slice_nnz),
        _digest_cells(cells),
        lengths,
    )
    if (twice := drafted.duplicated) and order.census.bad_cells == "error":
        raise InputError(
            f"var of {order.census.uri or order.census.version}: the feature_id {', '.join(twice[:5])} "
            f"stands more than once ({len(twice)} such). --census.bad_cells skip leaves these genes out."
        )
    return drafted


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
