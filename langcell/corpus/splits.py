"""Which split a cell belongs to: a pure function of obs, decided before any count is read.

`held_out` is taken first: the cells of held-out types and datasets. Of the rest, `test` and `val` are
whole datasets or whole donors where the corpus has enough of them (cells of one donor are more alike
than cells of one type, so a split inside a donor flatters every score), else cells of each type.

Everything is decided by hashes of names and joinids with the split's seed, never by position: the order
of the rows, the slicing and the numbering of categories change nothing. Counts are exact: `share x n`
rounded to the nearest whole (a half upwards). Of groups, each share above 0 takes one at least; of the
cells of a type, one at least stays in train. A donor_id is only unique within its dataset, so a donor is
the pair of both.
"""

from __future__ import annotations

import difflib
import hashlib
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from langcell.corpus.options import CorpusOptions
from langcell.corpus.schema import HELD_OUT, SPLITS, TEST, TRAIN, VAL
from langcell.errors import InputError

SPLIT_BY = ("auto", "dataset", "donor", "cell")


def split_columns(options: CorpusOptions, held_out_datasets: list[str]) -> list[str]:
    """Columns of obs that `assign_splits` needs beside soma_joinid."""
    columns = ["cell_type", "cell_type_ontology_term_id"]
    if options.split_by != "cell" or held_out_datasets:
        columns.append("dataset_id")
    if options.split_by in ("auto", "donor"):
        columns.append("donor_id")
    return columns


def check_split_options(options: CorpusOptions) -> None:
    """Raises InputError for a `split_by` or for shares that make no sense."""
    if options.split_by not in SPLIT_BY:
        raise InputError(
            f"corpus.split_by is {options.split_by!r}; choose one of: " + ", ".join(SPLIT_BY) + "."
        )
    shares = {"test_share": options.test_share, "val_share": options.val_share}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"corpus.{name} is {share}; it is a share, at least 0 and below 1.")
    if sum(shares.values()) >= 1:
        raise InputError("corpus.test_share and corpus.val_share leave no cell to train on; lower them.")


def assign_splits(
    obs: pa.Table, options: CorpusOptions, held_out_types: list[str], held_out_datasets: list[str]
) -> np.ndarray:
    """Split of every row of `obs`, int8 index into `SPLITS`.

    obs: soma_joinid (distinct), `term` (CL id that the cell type resolved to, or '') and the columns of
    `split_columns`, strings plain or dictionary-encoded. held_out_types: CL ids or labels, of the data or
    resolved (case does not matter). Raises InputError for a held-out type or dataset that no cell has, for
    too few groups of a kind that was asked for, and where no cell is left to train on.
    """
    check_split_options(options)
    terms, labels = _Column(obs, "term"), _Column(obs, "cell_type")
    types = _Column(obs, "cell_type_ontology_term_id")
    held_out = np.zeros(obs.num_rows, bool)
    for name in held_out_types:
        rows = terms.rows(name, fold=True) | types.rows(name, fold=True) | labels.rows(name, fold=True)
        if not rows.any():
            raise _absent("eval.held_out_types", name, "cell type", labels.values + terms.values)
        held_out |= rows
    for name in held_out_datasets:
        datasets = _Column(obs, "dataset_id")
        if name not in datasets.values:
            raise _absent("eval.held_out_datasets", name, "dataset", datasets.values)
        held_out |= datasets.rows(name)

    split = np.full(obs.num_rows, TRAIN, np.int8)
    split[held_out] = HELD_OUT
    rest = np.flatnonzero(~held_out)
    if len(rest) == 0:
        raise InputError(
            "Every cell is of a held-out type or dataset: nothing is left to train on. "
            "Shorten eval.held_out_types or eval.held_out_datasets."
        )
    groups = _groups(obs, options, rest)
    if groups is None:
        # A cell's type is its term; where it has none, its label.
        named = np.array(terms.values)[terms.code] != ""
        cell_type = np.where(named, terms.code, len(terms.values) + labels.code)
        split[rest] = _split_cells(obs["soma_joinid"].to_numpy()[rest], cell_type[rest], options)
    else:
        split[rest] = _split_groups(*groups, options)
    return split


def count_splits(split: np.ndarray) -> dict[str, int]:
    """Cells of each split, by name."""
    return dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist(), strict=True))


class _Column:
    """A string column as codes: `code` int64 per row into `values`, sorted and distinct; null is ''."""

    def __init__(self, obs: pa.Table, name: str) -> None:
        column = obs[name]
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        parts, names = [np.empty(0, np.int64)], [""]
        for chunk in column.unify_dictionaries().chunks:
            names = [*chunk.dictionary.to_pylist(), ""]
            parts.append(chunk.indices.cast(pa.int64()).fill_null(len(names) - 1).to_numpy())
        code = np.concatenate(parts)
        present = np.flatnonzero(np.bincount(code, minlength=len(names)))
        self.values: list[str] = sorted({names[i] for i in present})
        rank = {value: i for i, value in enumerate(self.values)}
        self.code = np.array([rank.get(value, -1) for value in names], np.int64)[code]

    def rows(self, name: str, *, fold: bool = False) -> np.ndarray:
        """Whether each row has the value `name` (bool); `fold`: whatever its case."""
        if fold:
            hit = [value.casefold() == name.casefold() for value in self.values]
        else:
            hit = [value == name for value in self.values]
        return np.array(hit, bool)[self.code]


def _absent(option: str, name: str, kind: str, present: list[str]) -> InputError:
    folded = {value.casefold(): value for value in present if value}
    close = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)
    nearest = ", ".join(repr(folded[value]) for value in close) or ", ".join(map(repr, present[:5]))
    return InputError(
        f"{option}: {name!r} is the {kind} of no cell that the filter keeps. Nearest in the data: {nearest}."
    )


def _groups(obs: pa.Table, options: CorpusOptions, rest: np.ndarray) -> tuple[list[str], np.ndarray] | None:
    """Names of the groups and the group of each row of `rest`; None where cells are split one by one."""
    needed = 1 + (options.test_share > 0) + (options.val_share > 0)
    for kind in ("dataset", "donor"):
        if options.split_by not in ("auto", kind):
            continue
        columns = [_Column(obs, name) for name in ("dataset_id", "donor_id")[: 1 + (kind == "donor")]]
        code = np.zeros(len(rest), np.int64)
        for column in columns:
            code = code * len(column.values) + column.code[rest]
        group, present = pd.factorize(code, sort=True)
        if len(present) >= max(needed, 2):
            parts = np.unravel_index(present, [len(column.values) for column in columns])
            names = zip(
                *([c.values[i] for i in part] for c, part in zip(columns, parts, strict=True)), strict=True
            )
            return ["\n".join(name) for name in names], group
        if options.split_by == kind:
            raise InputError(
                f"corpus.split_by: {kind} needs at least {max(needed, 2)} {kind}s for the shares asked for, "
                f"the cells that are not held out have {len(present)}; choose `cell` or `auto`."
            )
    return None


def _split_groups(names: list[str], group: np.ndarray, options: CorpusOptions) -> np.ndarray:
    """Split of every row, from the group of every row: whole groups in the order of their hashes."""
    key = [hashlib.blake2b(f"{options.split_seed}\n{name}".encode()).digest() for name in names]
    order = sorted(range(len(names)), key=key.__getitem__)
    n_val_least = int(options.val_share > 0)
    n_test = max(_whole(options.test_share, len(names)), int(options.test_share > 0))
    n_test = min(n_test, len(names) - 1 - n_val_least)
    n_val = min(max(_whole(options.val_share, len(names)), n_val_least), len(names) - 1 - n_test)
    split_of_group = np.full(len(names), TRAIN, np.int8)
    split_of_group[order[:n_test]] = TEST
    split_of_group[order[n_test : n_test + n_val]] = VAL
    return split_of_group[group]


def _split_cells(joinid: np.ndarray, cell_type: np.ndarray, options: CorpusOptions) -> np.ndarray:
    """Split of every cell: the first of its type, in the order of their hashes, are test, the next val."""
    hashed = _splitmix64(
        joinid.astype(np.uint64) ^ _splitmix64(np.array([options.split_seed % 2**64], np.uint64))
    )
    order = np.lexsort((hashed, cell_type))
    n_of_type = np.bincount(cell_type)
    rank = np.arange(len(order)) - (np.cumsum(n_of_type) - n_of_type)[cell_type[order]]
    n_test = np.minimum(_whole(options.test_share, n_of_type), n_of_type - 1)
    n_val = np.minimum(_whole(options.val_share, n_of_type), n_of_type - 1 - n_test)
    end_test, end_val = n_test[cell_type[order]], (n_test + n_val)[cell_type[order]]
    split = np.empty(len(order), np.int8)
    split[order] = np.where(rank < end_test, TEST, np.where(rank < end_val, VAL, TRAIN))
    return split


def _whole(share: float, n: Any) -> Any:
    """`share x n`, rounded to the nearest whole, a half upwards; n: int or integer array."""
    return np.floor(share * np.asarray(n) + 0.5).astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's finaliser (uint64 to uint64, a bijection: no two joinids tie)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
