"""obs of a file, in the words of a Census.

The columns that texts and splits are made of are there whatever the file has, and say `unknown` where it
says nothing, as a Census does; so one filter, one text and one split rule fit all sources. What the file says
of its cells beyond that keeps its name, for the filter.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd

from langcell.census.obs_map import ID, UNKNOWN, FileMap
from langcell.errors import InputError
from langcell.text.describe import UNKNOWN as SAYS_NOTHING
from langcell.text.options import FACETS

TEXT = (*(name for facet in FACETS for name in (facet, facet + ID)), "dataset_id", "donor_id")
"""Columns of text that every source has."""


def census_obs(
    obs: pd.DataFrame, of: FileMap, stem: str, path: str
) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """The cells of the file `path` in the words of a Census, and the labels it has in each mapped facet.

    obs: its own table; of: what the map says of it; stem: the dataset's name where it gives none. The result
    has, a row per cell in the file's order: `TEXT` (categories of str; a label is null where the id
    alone is known), is_primary_data (bool), raw_sum (float64, if the file has it) and the file's own columns.
    Raises InputError for a column that the map names and the file lacks, and for values of a wrong kind.
    """
    values = {str(name): column for name, column in obs.reset_index(drop=True).items()}
    for name, column in of.columns.items():
        if column not in obs:
            raise InputError(
                f"{path}: obs has no column {column}, which census.obs_map names for {name}. "
                f"It has: {', '.join(map(str, obs.columns)) or 'none'}"
            )
        if name in FACETS and name + ID not in of.columns:
            values.pop(name + ID, None)
        values[name] = obs[column].reset_index(drop=True)

    found: dict[str, set[str]] = {}
    everywhere = pd.Series(None, range(len(obs)), dtype=object)
    for facet in FACETS:
        label = _text(values.get(facet, everywhere))
        term_id = _text(values.get(facet + ID, everywhere))
        if facet in of.constants:
            label, term_id = everywhere, pd.Series(of.constants[facet], range(len(obs)), dtype=object)
        elif facet in of.labels:
            found[facet] = set(label.dropna().unique())
        values[facet], values[facet + ID] = _resolved(label, term_id, of.labels.get(facet, {}))
    for name, value in of.constants.items():
        if name not in FACETS:
            values[name] = pd.Series([value] * len(obs), dtype=bool if isinstance(value, bool) else object)
    values["dataset_id"] = _text(values.get("dataset_id", everywhere)).fillna(stem)
    values["donor_id"] = _text(values.get("donor_id", everywhere)).fillna(values["dataset_id"])
    values["is_primary_data"] = _bool(values.get("is_primary_data", everywhere), path)
    if "raw_sum" in values:
        values["raw_sum"] = _number(values["raw_sum"], path)
    for name in TEXT:
        values[name] = values[name].astype("category")
    return pd.DataFrame(values), found


def unnamed_labels(cells: pd.DataFrame, of: FileMap) -> dict[str, Counter[str]]:
    """Cells with a label that the map does not name, by facet that it maps and label."""
    counts = {
        facet: Counter(
            {
                str(label): int(n)
                for label, n in cells[facet].value_counts().items()
                if n and label not in labels and str(label).casefold() not in SAYS_NOTHING
            }
        )
        for facet, labels in of.labels.items()
    }
    return {facet: labels for facet, labels in counts.items() if labels}


def _resolved(
    label: pd.Series, term_id: pd.Series, ids: dict[str, str | None]
) -> tuple[pd.Series, pd.Series]:
    """Label and id of each cell, from those of the file and the ids that the map gives to labels."""
    label_code, labels = pd.factorize(label)
    id_code, term_ids = pd.factorize(term_id)
    row, pairs = pd.factorize((label_code + 1) * (len(term_ids) + 1) + id_code + 1)
    new_labels, new_ids = [], []
    for pair in pairs:
        at_label, at_id = divmod(pair, len(term_ids) + 1)  # 0 where there is none
        name = labels[at_label - 1] if at_label else None
        term = term_ids[at_id - 1] if at_id else None
        if name in ids:
            term = ids[name]
            name = name if term else UNKNOWN
        elif name is None and term in (None, UNKNOWN):
            name = UNKNOWN
        new_labels.append(name)
        new_ids.append(term or UNKNOWN)
    return tuple(pd.Series(np.array(new, object)[row]) for new in (new_labels, new_ids))  # type: ignore[return-value]


def _text(values: pd.Series) -> pd.Series:
    """Text of each value, None where there is none."""
    values = values.astype("category")
    names = np.array([*(str(name) for name in values.cat.categories), None], object)
    return pd.Series(names[values.cat.codes])  # the code of a missing value is -1


def _bool(values: pd.Series, path: str) -> pd.Series:
    given = values.astype(object).where(values.notna(), True)
    if not given.isin([True, False]).all():
        raise InputError(
            f"{path}: is_primary_data holds {given[~given.isin([True, False])].iloc[0]!r}, not true or "
            "false. Map it to another column with census.obs_map, columns, or give it under constants"
        )
    return given.astype(bool)


def _number(values: pd.Series, path: str) -> pd.Series:
    try:
        return values.astype(float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: raw_sum holds other things than numbers ({error}); it is the total count of a cell "
            "over all genes measured. Map it to another column with census.obs_map, columns"
        ) from error
