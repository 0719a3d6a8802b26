"""Cells of a folder of .h5ad files with raw counts, as one corpus.

The files, sorted by name, are one long table: a cell's soma_joinid is the number of cells in the files
before its own, plus its row, whatever the filter keeps. Opening reads each file's obs and var and the row
lengths of its matrix (of a dense one the counts), 3 us a cell. Whoever prepares a corpus also hashes the
files, at 0.9 GB/s, since nothing else pins what a folder holds. No handle stays open; obs is read again when
it is asked for, so that a folder costs 16 bytes a selected cell in between.

obs and var are read by anndata, which knows how its versions since 0.7 (2020) wrote tables; counts by
`h5ad_matrix`, since a task wants rows of a slice and not a matrix. What names mean is said by `obs_words` and
`genes`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from anndata.io import read_elem

from langcell.cells.symbols import GENES_OF, read_symbols
from langcell.census.genes import FileGenes, columns_in, file_genes, union
from langcell.census.h5ad_matrix import CountMatrix, opened
from langcell.census.h5ad_reader import H5adReader, StoredFile
from langcell.census.obs_map import FileMap, ObsMap
from langcell.census.obs_words import TEXT, census_obs, unnamed_labels
from langcell.census.options import CensusOptions
from langcell.census.value_filter import columns_of, matching
from langcell.errors import InputError

_TEXT = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class _Opened:
    """What was seen of a file. columns: of its obs, in the words of a Census; rows: those that the filter
    keeps, nnz: entries of each (both int64)."""

    path: str
    of: FileMap
    matrix: str
    start: int
    shape: tuple[int, int]
    columns: list[str]
    genes: FileGenes
    labels: dict[str, set[str]]
    unnamed: dict[str, Counter[str]]
    rows: np.ndarray
    nnz: np.ndarray

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]

    def cells(self) -> pd.DataFrame:
        """All cells, read anew, in the words of a Census."""
        return _read_obs(self.path, self.of)[0]


class H5adFolder:
    """The cells that the options select; keeps `langcell.census.slices.Source`.

    release: `uri`, `organism`, `filter`, `files` (digest of each by name), `obs_map` and `symbols` (digests
    of what they say, or None). reader: counts of a slice. remarks: columns of each file that are left out
    for want of an id, and for their name standing twice; cells with a label that the obs map does not
    name, by facet that it maps and label.
    """

    def __init__(self, options: CensusOptions, asked: dict[str, Any], files: list[_Opened]) -> None:
        self.options = options
        self._asked = asked
        self._files = files
        self._columns = list(dict.fromkeys(name for file in files for name in file.columns))
        self._var = union({file.path: file.genes for file in files})
        labels_unmapped: dict[str, Counter[str]] = {}
        for file in files:
            for facet, labels in file.unnamed.items():
                labels_unmapped.setdefault(facet, Counter()).update(labels)
        self.remarks: dict[str, dict[str, Any]] = {
            "genes_without_id": {file.name: file.genes.unmapped for file in files},
            "genes_duplicated": {file.name: file.genes.duplicated for file in files},
            "labels_unmapped": labels_unmapped,
        }
        ids = [tuple(file.genes.feature_id) for file in files]
        layouts = {layout: i for i, layout in enumerate(dict.fromkeys(ids))}
        feature_id = self._var["feature_id"].to_pylist()
        self.reader = H5adReader(
            tuple(
                StoredFile(f.path, f.matrix, f.start, f.shape, layouts[layout], "raw_sum" in f.columns)
                for f, layout in zip(files, ids, strict=True)
            ),
            tuple(columns_in(feature_id, layout) for layout in layouts),
            len(feature_id),
        )

    @classmethod
    def open(cls, options: CensusOptions) -> H5adFolder:
        """Looks into every file of the folder `options.uri` (absolute), and selects cells.

        Raises InputError: no such files, one that is damaged or has no raw counts by rows, an obs map
        or a table of symbols that is wrong or does not fit, genes without ids, a filter that is none or
        matches no cell.
        """
        paths = _paths(str(options.uri))
        if options.organism not in GENES_OF:
            raise InputError(
                f"census.organism is {options.organism!r}; .h5ad files may be of {', '.join(GENES_OF)}"
            )
        obs_map = ObsMap.read(options.obs_map) if options.obs_map else ObsMap()
        symbols = read_symbols(options.symbols) if options.symbols else None
        try:
            needed = columns_of(options.filter)
        except ValueError as error:
            raise _filter_refused(options, str(options.uri), error) from error
        files: list[_Opened] = []
        for path in paths:
            start = files[-1].stop if files else 0
            files.append(_look(path, start, obs_map.of(os.path.basename(path)), options, symbols, needed))
        obs_map.check_found({file.name: file.labels for file in files})
        asked = {
            "uri": options.uri,
            "organism": options.organism,
            "filter": options.filter,
            "obs_map": obs_map.digest if options.obs_map else None,
            "symbols": _digest_symbols(symbols) if symbols is not None else None,
        }
        folder = cls(options, asked, files)
        folder._check_columns(needed)
        if not any(len(file.rows) for file in files):
            raise InputError(
                f"census.filter {options.filter!r} matches no cell of {options.uri}. "
                "Loosen it; labels and ontology ids are compared letter by letter."
            )
        return folder

    @cached_property
    def release(self) -> dict[str, Any]:
        """Where the cells come from. Hashes every file: asked for by a job that prepares, not by a plan."""
        return self._asked | {"files": {file.name: _digest_file(file.path) for file in self._files}}

    def obs(self, columns: Iterable[str]) -> pa.Table:
        """As `Source.obs`; raw_sum is NaN for the cells of files that do not state it."""
        names = [c for c in dict.fromkeys(columns) if c not in ("soma_joinid", "raw_sum", "nnz")]
        self._check_columns(names)
        parts: dict[str, list[pa.Array]] = {name: [] for name in ("raw_sum", *names)}
        for file in self._files:
            cells = file.cells().iloc[file.rows]
            for name, arrays in parts.items():
                arrays.append(_to_arrow(cells[name]) if name in cells else pa.nulls(len(cells)))
        raw_sum = _joined(parts.pop("raw_sum")).cast(pa.float64()).fill_null(np.nan)
        numbers = {
            "soma_joinid": np.concatenate([file.start + file.rows for file in self._files]),
            "raw_sum": raw_sum,
            "nnz": np.concatenate([file.nnz for file in self._files]),
        }
        return pa.table({**numbers, **{name: _joined(arrays) for name, arrays in parts.items()}})

    def var(self) -> pa.Table:
        """As `Source.var`: the union of the files' genes, sorted by feature_id."""
        return self._var

    def datasets(self, soma_joinid: np.ndarray) -> list[str]:
        """As `Source.datasets`."""
        names: list[str] = []
        for file in self._files:
            first, last = np.searchsorted(soma_joinid, [file.start, file.stop])
            if first < last:
                rows = soma_joinid[first:last] - file.start
                names += file.cells()["dataset_id"].iloc[rows].tolist()
        return names

    def close(self) -> None:
        """Nothing is open."""

    def _check_columns(self, names: list[str]) -> None:
        if missing := [name for name in names if name not in self._columns]:
            raise InputError(
                f"obs of {self.options.uri} has no column {', '.join(missing)}. "
                f"It has: {', '.join(self._columns)}"
            )


def _look(
    path: str,
    start: int,
    of: FileMap,
    options: CensusOptions,
    symbols: dict[str, str] | None,
    needed: list[str],
) -> _Opened:
    """Opens a file, checks it and selects its cells. needed: columns of the filter."""
    cells, labels = _read_obs(path, of)
    key = of.matrix or "X"
    with _reading(path) as h5:
        var = _table(h5, "raw/var" if key == "raw/X" else "var")
        matrix = CountMatrix.of(h5, key, (len(cells), len(var)))
        matrix.check_raw()
        nnz = matrix.row_nnz()
    absent = dict.fromkeys((name for name in needed if name not in cells), np.nan)
    try:
        rows = np.flatnonzero(matching(cells.assign(**absent), options.filter))
    except ValueError as error:
        raise _filter_refused(options, path, error) from error
    return _Opened(
        path=path,
        of=of,
        matrix=key,
        start=start,
        shape=matrix.shape,
        columns=list(cells.columns),
        genes=file_genes(var, of.feature_id, symbols, options.organism, path, options.bad_cells == "skip"),
        labels=labels,
        unnamed=unnamed_labels(cells.iloc[rows], of),
        rows=rows,
        nnz=nnz[rows],
    )


def _read_obs(path: str, of: FileMap) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """All cells of a file in the words of a Census, and the labels it has in each mapped facet."""
    with _reading(path) as h5:
        obs = _table(h5, "obs")
    return census_obs(obs, of, os.path.basename(path).removesuffix(".h5ad"), path)


def _filter_refused(options: CensusOptions, where: str, error: Exception) -> InputError:
    return InputError(
        f"census.filter {options.filter!r} cannot be applied to obs of {where}: {error}. It compares columns "
        'with values, such as: is_primary_data == True and tissue in ["blood"]'
    )


def _paths(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".h5ad"))
    except OSError as error:
        raise InputError(f"census.uri {folder} cannot be read: {error.strerror}") from error
    if not names:
        raise InputError(f"census.uri {folder} holds no .h5ad file")
    return [os.path.join(folder, name) for name in names]


@contextmanager
def _reading(path: str) -> Iterator[h5py.File]:
    """The open file; what goes wrong in reading it is an InputError."""
    try:
        with opened(path) as h5:
            yield h5
    except OSError as error:
        raise InputError(
            f"{error}. It is damaged, cut or another format: copy it again, or take it out of the folder"
        ) from error


def _table(h5: h5py.File, key: str) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata has several to give on the age of a layout
            table = read_elem(h5[key])
    except Exception as error:  # a damaged table raises whatever its parts run into
        raise OSError(f"{key}: {error}") from error
    if not isinstance(table, pd.DataFrame):
        raise InputError(
            f"{h5.filename}: {key} is no table as anndata writes since 0.7. Write the file anew: "
            "anndata.read_h5ad(path).write_h5ad(path)"
        )
    return table


def _digest_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_symbols(symbols: dict[str, str]) -> str:
    lines = "\n".join(f"{symbol}\t{gene}" for symbol, gene in sorted(symbols.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _to_arrow(column: pd.Series) -> pa.Array:
    """Numbers and truth values as they are, everything else as text."""
    if column.name not in TEXT and (
        pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    ):
        return pa.Array.from_pandas(column)
    categories = column.astype("category")
    names = pa.array([str(name) for name in categories.cat.categories], pa.string())
    codes = pa.array(categories.cat.codes, pa.int32(), mask=(categories.cat.codes < 0).to_numpy())
    return pa.DictionaryArray.from_arrays(codes, names)


def _joined(parts: list[pa.Array]) -> pa.Array:
    """One array of all files' values: numbers as float64 where files differ, as text where one has text."""
    kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
    if len(kinds) > 1:
        numeric = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds)
        common = pa.float64() if numeric else _TEXT
    else:
        common = kinds.pop() if kinds else _TEXT
    cast = [part if part.type == common else _cast(part, common) for part in parts]
    joined = pa.chunked_array(cast, common)
    if pa.types.is_dictionary(common):
        joined = joined.unify_dictionaries()
    return joined.combine_chunks()


def _cast(part: pa.Array, to: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(to) and not pa.types.is_null(part.type):
        return part.cast(pa.string()).dictionary_encode()
    return pa.nulls(len(part), to) if pa.types.is_null(part.type) else part.cast(to)
