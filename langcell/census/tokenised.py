"""Token sentences that others made become a source of cells: a Hugging Face `datasets` folder.

LangCell's authors share their corpus, and Geneformer's theirs, as such folders: `input_ids` and columns of
obs, no counts. There is nothing to normalise or to rank; what a sentence may hold is checked, and the two
dialects are made one: LangCell's sentences begin with `<cls>`, Geneformer's do not, either may be padded.

obs comes from the metadata columns alone (`token_obs`). A sentence is read once, by the task of its slice,
from the mapped file straight into uint16: 600k sentences of 500 tokens a second and core from an Arrow
stream in the page cache, 210k from Parquet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import pandas as pd
import pyarrow as pa

from langcell.cells.vocabulary import FIRST_GENE, PAD, Vocabulary
from langcell.census import token_files
from langcell.census.obs_map import ObsMap
from langcell.census.obs_words import unnamed_labels
from langcell.census.opening import resolve
from langcell.census.options import CensusOptions
from langcell.census.slices import Sentences, Slice
from langcell.census.token_files import TOKENS, TokenFiles, lists_of
from langcell.census.token_obs import NUMBERED, TokenObs
from langcell.census.value_filter import columns_of, matching
from langcell.errors import InputError

_TEXT = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, eq=False)
class TokenReader:
    """Reads the sentences of a slice; travels by pickle. cls: token of `<cls>`, the last of the
    vocabulary; max_length: most tokens of a sentence, `<cls>` included."""

    files: TokenFiles
    cls: int
    max_length: int

    def __call__(self, part: Slice) -> Sentences:
        """The sentences of `part.cells`, in their order.

        `<cls>` is put before a sentence that does not begin with it, padding at the end is dropped, and
        what is longer than `max_length` is cut. Raises OSError for a file that is damaged or has changed.
        """
        found = [Sentences(np.zeros(1, np.int64), np.empty(0, np.uint16), np.empty(0, bool))]
        joinid = part.cells["soma_joinid"].to_numpy()
        for chosen in self.files.batches([TOKENS], joinid):
            values, begin, end = lists_of(chosen.batch.column(TOKENS))
            rows = chosen.rows
            found.append(Sentences(*_to_sentences(values, begin[rows], end[rows], self.cls, self.max_length)))
        length = np.concatenate([np.diff(one.offsets) for one in found])
        return Sentences(
            offsets=np.concatenate([[0], np.cumsum(length)]),
            tokens=np.concatenate([one.tokens for one in found]),
            fits=np.concatenate([one.fits for one in found]),
        )


class TokenisedFolder:
    """The cells of a folder that the options select; soma_joinid is the row over all files in order.

    options: the same with its place resolved. remarks: cells with a label that `census.obs_map` does
    not name, by facet and label. Nothing stays open between two calls.
    """

    def __init__(self, options: CensusOptions, files: TokenFiles, obs_map: ObsMap) -> None:
        self.options = options
        self.remarks: dict[str, dict[str, Any]] = {"labels_unmapped": {}}
        self._files, self._map = files, obs_map
        self._obs = TokenObs(files, obs_map, str(options.uri))
        self._selected = self._select()

    @staticmethod
    def stands_at(folder: Path) -> bool:
        """Whether `datasets` wrote the folder, or Parquet files lie in it."""
        return token_files.stands_at(folder)

    @classmethod
    def open(cls, options: CensusOptions) -> TokenisedFolder:
        """Finds the files, and the cells that the filter matches.

        Raises InputError: no data files or damaged ones, none of token sentences, files of different
        columns, a map that does not fit them, a filter that is none or matches no cell.
        """
        options = resolve(options)
        files = TokenFiles.open(Path(str(options.uri)))
        return cls(options, files, ObsMap.read(options.obs_map) if options.obs_map else ObsMap())

    @cached_property
    def release(self) -> dict[str, Any]:
        """What the cells come from: `uri`, `organism`, `filter`, `files` (blake2b by name) and `obs_map`
        (digest or None). Reads all files when it is first asked for, about 1 GB a second and core."""
        return {
            "uri": self.options.uri,
            "organism": self.options.organism,
            "filter": self.options.filter,
            "files": self._files.digests(),
            "obs_map": self._map.digest if self.options.obs_map else None,
        }

    def obs(self, columns: Iterable[str]) -> pa.Table:
        """The selected cells in joinid order.

        soma_joinid (int64), raw_sum (float64, NaN: sentences do not tell), nnz (int64, length of the
        sentence as it stands in the file), then `columns`; text as dictionary<int32, string>. Facets
        that the folder does not have say `unknown`, dataset_id the name of the folder. Raises InputError
        for any other column that it does not have.
        """
        names = [name for name in dict.fromkeys(columns) if name not in NUMBERED]
        joinid = np.flatnonzero(self._selected)
        nnz: list[np.ndarray] = []
        parts: dict[str, list[pa.Array]] = {name: [] for name in names}
        for segment in self._obs.segments(names, None if self._selected.all() else joinid, lengths=True):
            nnz.append(segment.length)
            for name in names:
                parts[name].append(_to_arrow(segment.cells[name]))
        numbers = {"soma_joinid": joinid, "raw_sum": np.full(len(joinid), np.nan), "nnz": np.concatenate(nnz)}
        return pa.table({**numbers, **{name: _joined(arrays) for name, arrays in parts.items()}})

    def datasets(self, soma_joinid: np.ndarray) -> list[str]:
        """The dataset of each cell, by joinid (int64, ascending), to name it in a message."""
        segments = self._obs.segments(["dataset_id"], soma_joinid)
        return [str(name) for segment in segments for name in segment.cells["dataset_id"]]

    def reader_for(self, vocabulary: Vocabulary, max_length: int) -> TokenReader:
        """The reader of the sentences, which hold tokens of `vocabulary`; at most `max_length` each.

        Raises InputError for max_length below 2.
        """
        if max_length < 2:
            says = f"tokens.max_length is {max_length}; a sentence needs <cls> and a gene, 2 at least"
            raise InputError(says)
        return TokenReader(self._files, vocabulary.cls, max_length)

    def close(self) -> None:
        """Nothing to close."""

    def _select(self) -> np.ndarray:
        """Whether the filter matches each row (bool)."""
        uri, expression = self.options.uri, self.options.filter
        try:
            columns = columns_of(expression) if expression.strip() else []
        except ValueError as error:
            raise self._refused(error) from error
        kept = [np.empty(0, bool)]
        found: dict[str, dict[str, set[str]]] = {name: {} for name in self._files.names}
        for segment in self._obs.segments([*columns, *self._obs.labelled]):
            try:
                hit = matching(segment.cells, expression)
            except ValueError as error:
                raise self._refused(error) from error
            kept.append(hit)
            for facet, labels in segment.found.items():
                found[segment.file].setdefault(facet, set()).update(labels)
            if segment.of.labels:
                for facet, cells in unnamed_labels(segment.cells[hit], segment.of).items():
                    self.remarks["labels_unmapped"].setdefault(facet, Counter()).update(cells)
        self._map.check_found(found)
        selected = np.concatenate(kept)
        if not selected.any():
            raise InputError(
                f"census.filter {expression!r} matches no cell of {uri}. "
                "Loosen it; labels and ontology ids are compared letter by letter."
            )
        return selected

    def _refused(self, error: Exception) -> InputError:
        return InputError(
            f"census.filter {self.options.filter!r} cannot be applied to obs of {self.options.uri}: {error}. "
            'It compares columns with values, such as: is_primary_data == True and tissue in ["blood"]'
        )


def _to_arrow(column: pd.Series) -> pa.Array:
    """Numbers and truth values as they are, everything else as text."""
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return pa.Array.from_pandas(column)
    return pa.Array.from_pandas(column.astype("category")).cast(_TEXT)


def _joined(parts: list[pa.Array]) -> pa.Array:
    """One array of the values of all segments, one dictionary."""
    joined = pa.concat_tables([pa.table({"": part}) for part in parts], promote_options="permissive")[""]
    return joined.unify_dictionaries().combine_chunks()


@nb.njit(cache=True, nogil=True)
def _to_sentences(values, begin, end, cls, max_length):  # type: ignore[no-untyped-def]
    """Offsets, tokens and fits of `Sentences` for the lists [begin, end) of `values`."""
    n_cells = len(begin)
    room = 0
    for cell in range(n_cells):
        room += min(end[cell] - begin[cell] + 1, max_length)
    offsets = np.zeros(n_cells + 1, np.int64)
    tokens = np.empty(room, np.uint16)
    fits = np.ones(n_cells, np.bool_)
    at = 0
    for cell in range(n_cells):
        first, last = begin[cell], end[cell]
        while last > first and values[last - 1] == PAD:
            last -= 1
        if last > first and values[first] == cls:
            first += 1
        for i in range(first, last):
            if values[i] < FIRST_GENE or values[i] >= cls:
                fits[cell] = False
                break
        if fits[cell]:
            tokens[at] = cls
            n = min(last - first, max_length - 1)
            for i in range(n):
                tokens[at + 1 + i] = values[first + i]
            at += 1 + n
        offsets[cell + 1] = at
    return offsets, tokens[:at].copy(), fits
