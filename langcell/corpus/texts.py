"""The text table: one row per distinct text, found from obs alone.

Cells outnumber the distinct combinations of their facets by far (7.1M cells of CELLxGENE carry 11,260
texts), so each combination is described once and a cell keeps only the id of its text. Two combinations
can give one text (ids of a facet that has no definition and one label); the first of them in joinid
order then stands for both, with its term.

Training tokenises it (`text_table`): what prepares a corpus loads no torch. Shape suffix: K distinct texts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from langcell.corpus.schema import SPLITS, text_schema
from langcell.errors import InputError
from langcell.storage import open_root, read_file
from langcell.text.describe import Coverage, describe
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

NAME = "texts.parquet"


@dataclass(frozen=True)
class Texts:
    """The distinct texts of a corpus, in ascending order of their ids.

    text_id: int64 [K]; variants: of each text, the full one first, then the shortened ones, the cell
    type alone last; term: CL id of its cell type or ''; ancestors: is_a closure of the term; facet_ids:
    ontology ids by facet; cells: int64 [K, 4], cells that have the text, by split in the order of
    `SPLITS`.
    """

    text_id: np.ndarray
    variants: list[list[str]]
    term: list[str]
    ancestors: list[list[str]]
    facet_ids: dict[str, list[str]]
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.term)

    @property
    def terms(self) -> list[str]:
        """The distinct cell-type terms, sorted."""
        return sorted(set(self.term) - {""})

    @property
    def term_index(self) -> np.ndarray:
        """Index of each text's term in `terms`, -1 where it has none (int64 [K])."""
        index = {term: i for i, term in enumerate(self.terms)}
        return np.array([index.get(term, -1) for term in self.term], np.int64)

    def count(self, text_of_cell: np.ndarray, split: np.ndarray) -> Texts:
        """The same with `cells` counted from the index of each cell's text and its split."""
        flat = np.bincount(text_of_cell * len(SPLITS) + split, minlength=len(self) * len(SPLITS))
        return replace(self, cells=flat.reshape(len(self), len(SPLITS)))


def text_columns(options: TextOptions) -> list[str]:
    """Columns of obs that the texts are made of."""
    return [name for facet in options.facets for name in (facet, f"{facet}_ontology_term_id")]


def describe_obs(
    obs: pa.Table, ontology: Ontology, options: TextOptions
) -> tuple[Texts, np.ndarray, Coverage]:
    """The distinct texts of the cells of `obs`, the index of each cell's text (int64), what was resolved.

    obs: the columns of `text_columns`. The texts' `cells` are zero until `Texts.count`.
    """
    columns = text_columns(options)
    combination = _combinations(obs.select(columns))
    first = np.empty(combination.max(initial=-1) + 1, np.int64)
    first[combination[::-1]] = np.arange(len(combination))[::-1]
    n_cells = np.bincount(combination).tolist()
    coverage = Coverage()
    found = []
    for row, cells in zip(obs.select(columns).take(first).to_pylist(), n_cells, strict=True):
        facets = {facet: (row[facet], row[f"{facet}_ontology_term_id"]) for facet in options.facets}
        description = describe(facets, ontology, options)
        coverage.add(description, cells)
        found.append((description, facets))
    ids, index, text_of_combination = np.unique(
        np.array([description.text_id for description, _ in found], np.int64),
        return_index=True,
        return_inverse=True,
    )
    distinct = [found[i] for i in index]
    texts = Texts(
        text_id=ids,
        variants=[[description.text, *description.variants] for description, _ in distinct],
        term=[description.term for description, _ in distinct],
        ancestors=[sorted(ontology.ancestors(description.term)) for description, _ in distinct],
        facet_ids={facet: [facets[facet][1] for _, facets in distinct] for facet in options.facets},
        cells=np.zeros((len(ids), len(SPLITS)), np.int64),
    )
    return texts, text_of_combination[combination], coverage


def _combinations(obs: pa.Table) -> np.ndarray:
    """Number of each row's combination of values, in order of appearance (int64 [cells]).

    Folded column by column: 24 bytes a cell at the most, where a groupby over all columns takes 180.
    """
    combination = np.zeros(len(obs), np.int64)
    for column in obs.columns:
        chunks = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        encoded = chunks.unify_dictionaries().combine_chunks()
        code = encoded.indices.cast(pa.int64()).fill_null(len(encoded.dictionary)).to_numpy()
        combination, _ = pd.factorize(combination * (len(encoded.dictionary) + 1) + code)
    return combination


def write_texts(texts: Texts) -> pa.Buffer:
    """The text table as the bytes of texts.parquet."""
    columns = [texts.text_id, texts.variants, texts.term, texts.ancestors, *texts.facet_ids.values()]
    schema = text_schema(list(texts.facet_ids))
    table = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip([*columns, *texts.cells.T], schema, strict=True)], schema=schema
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_texts(dir: str) -> Texts:
    """The text table of the corpus in `dir` (a path or pyarrow filesystem URI).

    Raises InputError where there is none.
    """
    try:
        data = read_file(open_root(dir), NAME)
    except FileNotFoundError:
        raise InputError(
            f"corpus.dir: {dir} has no {NAME}; prepare the corpus with jobs/prepare.py."
        ) from None
    table = pq.read_table(pa.BufferReader(data))
    suffix = "_ontology_term_id"
    return Texts(
        text_id=table["text_id"].to_numpy(),
        variants=table["variants"].to_pylist(),
        term=table["term"].to_pylist(),
        ancestors=table["ancestors"].to_pylist(),
        facet_ids={
            name.removesuffix(suffix): table[name].to_pylist()
            for name in table.column_names
            if name.endswith(suffix)
        },
        cells=np.stack([table[f"n_{split}"].to_numpy() for split in SPLITS], axis=1),
    )
