"""obs of a folder of token sentences, in the words of a Census, a segment of rows at a time.

`obs_words` says what columns and labels mean, one value at a time in pandas: 8 us a cell, four minutes for
27.5M. But what it says depends on facets, dataset and donor alone, of which few combinations are distinct
(7.1M cells of CELLxGENE have 19,227). So each combination of a segment is put in words once, and its cells
take them by number: 1.9 us a cell, reading included. Columns that it would not touch pass by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from langcell.census.obs_map import ID, FileMap, ObsMap
from langcell.census.obs_words import TEXT, census_obs
from langcell.census.token_files import Chosen, TokenFiles, lists_of
from langcell.errors import InputError
from langcell.text.options import FACETS

SEGMENT = 1 << 18
"""Rows that are put in words at a time (or those of a file, if they are fewer)."""

NUMBERED = ("soma_joinid", "raw_sum", "nnz")
"""Columns that are not read but made."""

_EVERYWHERE = (*TEXT, "is_primary_data")


@dataclass(frozen=True, eq=False)
class Segment:
    """Some cells of one file.

    file: its name; of: what the map says of it; cells: a row each, with the columns asked for; length: of
    their sentences as they stand in the file (int64, empty where not asked for); found: labels that the
    file has in the facets that the map names, among those asked for.
    """

    file: str
    of: FileMap
    cells: pd.DataFrame
    length: np.ndarray
    found: dict[str, set[str]]


class TokenObs:
    """What the files of the folder `uri` say of their cells.

    labelled: facets of which the map names labels. Raises InputError for a column that the map names and the
    files do not have.
    """

    def __init__(self, files: TokenFiles, obs_map: ObsMap, uri: str) -> None:
        self._files, self._uri = files, uri
        self._of = [_of_sentences(obs_map.of(name)) for name in files.names]
        for name, of in zip(files.names, self._of, strict=True):
            for column, source in of.columns.items():
                if source not in files.columns:
                    raise InputError(
                        f"census.obs_map: {obs_map.path} names the column {source} for {column}, which "
                        f"{name} in {uri} does not have. It has: {', '.join(files.columns)}"
                    )
        self.labelled = sorted({facet for of in self._of for facet in of.labels})

    def segments(
        self, names: Iterable[str], wanted: np.ndarray | None = None, lengths: bool = False
    ) -> Iterator[Segment]:
        """The cells in the order of rows, with the columns `names` of a Census.

        wanted: rows, int64, ascending (None: all); lengths: whether those of the sentences are needed.
        Raises InputError for a column that the files do not have, and for one of lists or structures.
        """
        names = list(dict.fromkeys(names))
        passing = [self._passing(names, of) for of in self._of]
        sources = [self._sources(names, of) for of in self._of]
        read = sorted({column for columns in (*passing, *sources) for column in columns})
        for file, raw, length in self._raw(read, wanted, lengths):
            of = self._of[file]
            worded = [name for name in names if name not in passing[file]]
            words, found = self._words(raw[sources[file]], of, worded)
            cells = pd.concat([words, raw[passing[file]]], axis=1)
            yield Segment(self._files.names[file], of, cells, length, found)

    def _passing(self, names: Sequence[str], of: FileMap) -> list[str]:
        """Columns that stay as they are."""
        mapped = {*of.columns, *of.constants, *_EVERYWHERE}
        passing = [name for name in names if name not in mapped]
        if missing := [name for name in passing if name not in self._files.columns]:
            present = dict.fromkeys([*NUMBERED, *_EVERYWHERE, *mapped, *self._files.columns])
            raise InputError(
                f"obs of {self._uri} has no column {', '.join(missing)}. It has: {', '.join(present)}"
            )
        return passing

    def _sources(self, names: Sequence[str], of: FileMap) -> list[str]:
        """Columns of the files that the others of `names` are made of."""
        wanted = {*names} - {*self._passing(names, of)} | {*of.columns.values()}
        for facet in FACETS:  # of label and id, each says something of the other
            if wanted & {facet, facet + ID}:
                wanted |= {facet, facet + ID}
        if "donor_id" in wanted:  # the dataset stands for a donor who is not named
            wanted |= {"dataset_id"}
        return [name for name in self._files.columns if name in wanted]

    def _words(
        self, raw: pd.DataFrame, of: FileMap, names: list[str]
    ) -> tuple[pd.DataFrame, dict[str, set[str]]]:
        """`names` of the `census_obs` of the columns `raw`, by way of their distinct rows."""
        number = np.zeros(len(raw), np.int64)
        if len(raw.columns):
            grouped = raw.groupby(list(raw.columns), observed=True, sort=False, dropna=False)
            number = grouped.ngroup().to_numpy()
        first = np.empty(number.max() + 1, np.int64)
        first[number[::-1]] = np.arange(len(number))[::-1]
        words, found = census_obs(raw.iloc[first], of, Path(self._uri).name, self._uri)
        return words[names].iloc[number].reset_index(drop=True), found

    def _raw(
        self, names: list[str], wanted: np.ndarray | None, lengths: bool
    ) -> Iterator[tuple[int, pd.DataFrame, np.ndarray]]:
        """Segments as they stand in the files: index of the file, columns `names`, lengths."""
        unread = np.empty(0, np.int64)
        if not names and not lengths:  # the number of rows says all
            for file in range(len(self._files.names)):
                first, stop = self._files.rows_of(file)
                n = stop - first if wanted is None else np.diff(np.searchsorted(wanted, [first, stop]))[0]
                for start in range(0, n, SEGMENT):
                    yield file, pd.DataFrame(index=range(min(SEGMENT, n - start))), unread
            return
        length_column = self._files.length_column
        columns = list(dict.fromkeys([*names, length_column])) if lengths else names
        for chosen in _segments(self._batches(columns, wanted)):
            length = [_lengths(one.batch.column(length_column))[one.rows] for one in chosen if lengths]
            frame = pd.DataFrame(index=range(sum(len(one.rows) for one in chosen)))
            if names:
                frame = _frame(pa.Table.from_batches([_rows(one, names) for one in chosen]), self._uri)
            yield chosen[0].file, frame, np.concatenate([unread, *length])

    def _batches(self, columns: list[str], wanted: np.ndarray | None) -> Iterator[Chosen]:
        try:
            yield from self._files.batches(columns, wanted)
        except OSError as error:
            raise InputError(f"census.uri {self._uri}: {error}. Copy or write it anew") from error


def _of_sentences(of: FileMap) -> FileMap:
    """The same without raw_sum, which nothing made of sentences needs and hardly two cells share."""
    return replace(of, columns={name: column for name, column in of.columns.items() if name != "raw_sum"})


def _segments(batches: Iterator[Chosen]) -> Iterator[list[Chosen]]:
    """Batches of one file each, `SEGMENT` rows or what the file has left."""
    segment: list[Chosen] = []
    rows = 0
    for chosen in batches:
        if segment and (rows >= SEGMENT or chosen.file != segment[0].file):
            yield segment
            segment, rows = [], 0
        segment.append(chosen)
        rows += len(chosen.rows)
    if segment:
        yield segment


def _rows(chosen: Chosen, names: list[str]) -> pa.RecordBatch:
    """The chosen rows of a batch, columns `names`."""
    batch = chosen.batch.select(names)
    return batch if len(chosen.rows) == len(batch) else batch.take(pa.array(chosen.rows))


def _lengths(column: pa.Array) -> np.ndarray:
    """Lengths of sentences, from the column that tells them (int64)."""
    if pa.types.is_integer(column.type):
        return column.to_numpy().astype(np.int64, copy=False)
    _, begin, end = lists_of(column)
    return end - begin


def _frame(table: pa.Table, uri: str) -> pd.DataFrame:
    """The same in pandas, text as categories; labels in place of a `ClassLabel`'s numbers."""
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    columns = {}
    for field in table.schema:
        column, kind = table[field.name], field.type
        if pa.types.is_nested(kind):
            raise InputError(f"census.uri {uri}: column {field.name} is {kind}: no text or number of a cell")
        if features.get(field.name, {}).get("_type") == "ClassLabel":
            column = _labels(column.combine_chunks(), features[field.name]["names"], field.name, uri)
        elif not (pa.types.is_primitive(kind) or pa.types.is_dictionary(kind)):
            column = (column.cast(pa.string()) if pa.types.is_null(kind) else column).dictionary_encode()
        columns[field.name] = column.to_pandas()
    return pd.DataFrame(columns)


def _labels(numbers: pa.Array, names: list[str], column: str, uri: str) -> pa.Array:
    """Label of each number; none where it is negative, as `datasets` marks what has no label."""
    known = pc.if_else(pc.less(numbers, 0), None, numbers)
    if len(numbers) > numbers.null_count and pc.max(numbers).as_py() >= len(names):
        raise InputError(
            f"census.uri {uri}: {column} holds the label number {pc.max(numbers)} and names {len(names)}: "
            "it is damaged. Copy or write it anew"
        )
    return pa.DictionaryArray.from_arrays(known.cast(pa.int32()), pa.array(names, pa.string()))
