"""The genes of several files as one list: which column of a file is which gene of the corpus.

Files of several studies measure different genes. The corpus has the union, sorted by id, so that the order
of genes (which breaks ties of equal rank) depends neither on the order of the files nor of their columns.

A column without an Ensembl id leaves the corpus but stays in its cells' totals, which are counts over all
genes measured. Two symbols of one id are one gene, their counts are summed. The same name twice is neither
one gene nor two: nobody knows which column is right, so it is an error or, under `census.bad_cells: skip`,
both are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from langcell.cells.symbols import GENES_OF, ID_COLUMNS, NAME_COLUMNS, ensembl_id, names_in
from langcell.errors import InputError


@dataclass(frozen=True)
class FileGenes:
    """The columns of one file, in its order.

    feature_id: id of each, '' where it is left out; feature_name: symbol, or the id where none is known;
    unmapped, duplicated: columns left out for want of an id, and for their name standing twice.
    """

    feature_id: list[str]
    feature_name: list[str]
    unmapped: int
    duplicated: int


def file_genes(
    var: pd.DataFrame,
    column: str | None,
    symbols: dict[str, str] | None,
    organism: str,
    path: str,
    skip_duplicated: bool,
) -> FileGenes:
    """Ids of the columns of the file `path`.

    var: its table of genes; column: the one with ids (None: the index, or where that has no Ensembl ids, a
    column of a usual name that has nothing else); symbols: Ensembl id by symbol. Without `symbols`, what is
    no Ensembl id stands as it is. Raises InputError: no such column, an id of another organism, the same
    id or name twice (unless `skip_duplicated`), no gene left.
    """
    given = _given_ids(var, column, path)
    bare = [ensembl_id(name) or name for name in given]
    ids = bare
    if symbols is not None:
        ids = [name if ensembl_id(name) else symbols.get(name, "") for name in bare]
    for gene in ids:
        other = ensembl_id(gene)
        if other and other[:-11] != GENES_OF[organism]:  # before the eleven digits
            raise InputError(
                f"{path}: gene {gene} is not of {organism} ({GENES_OF[organism]}...); a corpus is of one "
                "organism, given with census.organism, and census.symbols must be of the same"
            )
    unmapped = ids.count("")
    times = Counter(name for name, gene in zip(bare, ids, strict=True) if gene)
    twice = {name for name, n in times.items() if n > 1}
    if twice and not skip_duplicated:
        name = next(name for name in bare if name in twice)
        raise InputError(
            f"{path}: var has {name} {times[name]} times ({len(twice)} such names): duplicated feature_id. "
            "Name other ids with feature_id in census.obs_map, mend the file, or leave these columns out "
            "with census.bad_cells: skip"
        )
    kept = ["" if name in twice else gene for name, gene in zip(bare, ids, strict=True)]
    if not any(kept):
        raise InputError(
            f"{path}: none of its {len(given)} genes ({', '.join(given[:3])}, ...) has an id; name the "
            "column of var that holds ids with feature_id in census.obs_map, or give another census.symbols"
        )
    return FileGenes(kept, _names(var, given, kept), unmapped, sum(times[name] for name in twice))


def union(files: Mapping[str, FileGenes]) -> pa.Table:
    """All genes, sorted by id: soma_joinid (int64: 0, 1, 2, ...), feature_id, feature_name (string).

    files: by path. A gene has the first name that a file gives it, in the order of the files. Raises
    InputError where some files have Ensembl ids and others names: they would share no gene.
    """
    by_id = {path: _mostly_ensembl(genes) for path, genes in files.items()}
    if len(set(by_id.values())) > 1:
        raise InputError(
            f"{_first(by_id, True)} has Ensembl ids and {_first(by_id, False)} other names of genes, so that "
            "they would share none; give a table of symbols with census.symbols"
        )
    name_of: dict[str, str] = {}
    for genes in files.values():
        for gene, name in zip(genes.feature_id, genes.feature_name, strict=True):
            if gene and name_of.get(gene, gene) == gene:
                name_of[gene] = name
    ids = sorted(name_of)
    return pa.table(
        {
            "soma_joinid": pa.array(range(len(ids)), pa.int64()),
            "feature_id": pa.array(ids, pa.string()),
            "feature_name": pa.array([name_of[gene] for gene in ids], pa.string()),
        }
    )


def columns_in(feature_id: list[str], ids: Iterable[str]) -> np.ndarray:
    """Where the columns of a file stand in the union, -1 where one is left out (int32); ids: theirs."""
    place = {gene: i for i, gene in enumerate(feature_id)}
    return np.array([place.get(gene, -1) for gene in ids], np.int32)


def _given_ids(var: pd.DataFrame, column: str | None, path: str) -> list[str]:
    if column is not None:
        if column not in var:
            raise InputError(
                f"{path}: var has no column {column}, which census.obs_map names as feature_id. "
                f"It has: {', '.join(map(str, var.columns)) or 'an index alone'}"
            )
        return names_in(var[column])
    index = names_in(var.index)
    if not any(map(ensembl_id, index)):
        for name in ID_COLUMNS:
            if name in var and all(map(ensembl_id, ids := names_in(var[name]))):
                return ids
    return index


def _names(var: pd.DataFrame, given: list[str], kept: list[str]) -> list[str]:
    """Symbol of each gene: what the file calls it, unless that is an id too."""
    column = next((name for name in NAME_COLUMNS if name in var), None)
    called = names_in(var[column]) if column else given
    return [gene if not name or ensembl_id(name) else name for name, gene in zip(called, kept, strict=True)]


def _mostly_ensembl(genes: FileGenes) -> bool:
    ids = [gene for gene in genes.feature_id if gene]
    return 2 * sum(map(bool, map(ensembl_id, ids))) > len(ids)


def _first(by_id: dict[str, bool], wanted: bool) -> str:
    return next(path for path, found in by_id.items() if found is wanted)
