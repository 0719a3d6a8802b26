"""`census.obs_map`: what the columns and labels of other people's files mean in the words of a Census.

Studies call a cell type `celltype` or `cell_type_author` and write it in their own words, so someone who
knows the study says once, in YAML, what is what:

    columns: {cell_type: celltype, donor_id: sample, raw_sum: n_counts}   # obs of a Census <- of the file
    feature_id: ensembl          # column of var that holds gene ids; default: the index
    matrix: raw/X                # where the counts are: X (default), raw/X or layers/NAME
    labels:                      # facet: label in the file -> ontology id; null: says nothing of the cell
      cell_type: {CD4 Naive T: CL:0000895, Doublet: null}
    constants:                   # of all cells: a facet's ontology id, or the value of another column
      {assay: EFO:0009901, dataset_id: kang, is_primary_data: true}
    files:                       # the same keys for one file, over those above
      zheng.h5ad: {columns: {cell_type: celltype, raw_sum: null}}      # null: as if not given above

A label stays as the study wrote it and gets an id beside it, since ids decide what a text says. Where a facet
is read from another column, the file's own ids of that facet go: they are of the labels that it replaces.
Nothing is guessed and nothing overlooked: a label that no file has is an error (it is a slip of the pen), one
that the map does not name is kept and counted, and an id must be of an ontology that the facet may hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from langcell.errors import InputError
from langcell.text.describe import ONTOLOGIES_OF
from langcell.text.options import FACETS
from langcell.text.releases import ONTOLOGIES

ID = "_ontology_term_id"
UNKNOWN = "unknown"
"""What a Census writes where nothing is known."""

_MATRIX = re.compile(r"X|raw/X|layers/[^/]+")
_NUMBERED = ("soma_joinid", "nnz")
"""Columns that are made from the file itself."""


@dataclass(frozen=True)
class FileMap:
    """What the parts of one file mean; keys as in the module's header, null where nothing is said."""

    columns: dict[str, str | None] = field(default_factory=dict)
    feature_id: str | None = None
    matrix: str | None = None
    labels: dict[str, dict[str, str | None]] = field(default_factory=dict)
    constants: dict[str, str | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ObsMap:
    """The map of a folder. path: where it was read, to name it in messages; files: by name of the file."""

    path: str = ""
    common: FileMap = field(default_factory=FileMap)
    files: dict[str, FileMap] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> ObsMap:
        """Reads YAML. Raises InputError, naming the key, for whatever the header above does not allow."""
        try:
            with open(path, "rb") as file:
                content = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"census.obs_map: {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"census.obs_map: {path} holds no keys; they are: {', '.join(_KEYS)}, files")
        files = content.pop("files", {})
        if not isinstance(files, dict):
            raise InputError(f"census.obs_map: {path}, files: must name files, each with keys of its own")
        return cls(
            path,
            _file_map(content, path),
            {str(name): _file_map(keys, f"{path}, files, {name}") for name, keys in files.items()},
        )

    @property
    def digest(self) -> str:
        """Hex digest of what the map says, whatever its layout and comments."""
        content = json.dumps(
            [asdict(self.common), {n: asdict(f) for n, f in self.files.items()}], sort_keys=True
        )
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def of(self, name: str) -> FileMap:
        """What holds for the file `name`: its own keys over the common ones."""
        common, own = self.common, self.files.get(name, FileMap())
        columns = {key: value for key, value in common.columns.items() if key not in own.constants}
        constants = {key: value for key, value in common.constants.items() if key not in own.columns}
        facets = [*common.labels, *own.labels]
        return FileMap(
            columns={k: v for k, v in (columns | own.columns).items() if v is not None},
            feature_id=own.feature_id or common.feature_id,
            matrix=own.matrix or common.matrix,
            labels={f: common.labels.get(f, {}) | own.labels.get(f, {}) for f in facets},
            constants={k: v for k, v in (constants | own.constants).items() if v is not None},
        )

    def check_found(self, found: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        """Raises InputError for a file or a label of the map that is not there.

        found: labels of each facet that each file of the folder has, by name of the file.
        """
        for name in self.files:
            if name not in found:
                raise InputError(
                    f"census.obs_map: {self.path} names the file {name}, which is not in the folder; "
                    f"it holds: {', '.join(found)}"
                )
        for where, keys, names in [
            (self.path, self.common, list(found)),
            *((f"{self.path}, files, {name}", keys, [name]) for name, keys in self.files.items()),
        ]:
            for facet, labels in keys.labels.items():
                there = {label for name in names for label in found[name].get(facet, ())}
                if missing := [label for label in labels if label not in there]:
                    raise InputError(
                        f"census.obs_map: {where}, labels, {facet}: no cell has the label {missing[0]!r}; "
                        f"labels there: {', '.join(map(repr, sorted(there))) or 'none'}"
                    )


_KEYS = tuple(FileMap.__dataclass_fields__)


def _file_map(content: Any, where: str) -> FileMap:
    """One level of the map, checked. `where` names it in a message."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FileMap)
    if not isinstance(content, dict):
        raise _wrong(where, f"{content!r} is no set of keys")
    if strange := [str(key) for key in content if key not in _KEYS]:
        raise _wrong(where, f"unknown key {', '.join(strange)}")
    if empty := [key for key, value in content.items() if value is None]:
        raise _wrong(where, f"{empty[0]} has nothing below it; leave it out")
    try:
        keys = FileMap(**vars(parser.parse_object(content)))
    except ArgumentError as error:
        raise _wrong(where, " ".join(str(error).split())) from error
    for name in ("columns", "labels", "constants"):
        _check_names(getattr(keys, name), f"{where}, {name}")
    keys = FileMap(**(vars(keys) | {"labels": _check_labels(keys.labels, where)}))
    if keys.matrix is not None and not _MATRIX.fullmatch(keys.matrix):
        raise _wrong(f"{where}, matrix", f"{keys.matrix!r} is not X, raw/X or layers/NAME")
    for name, value in keys.constants.items():
        _check_constant(name, value, f"{where}, constants, {name}")
        if value is not None and keys.columns.get(name) is not None:
            raise _wrong(where, f"{name} stands under columns and under constants; keep one")
    return keys


def _check_names(keys: dict[str, Any], where: str) -> None:
    for name in keys:
        if not isinstance(name, str):
            raise _wrong(where, f"{name!r} is no text; put it in quotes")
        if name in _NUMBERED:
            raise _wrong(where, f"{name} is made from the file and cannot be given")


def _check_labels(labels: dict[str, dict[Any, str | None]], where: str) -> dict[str, dict[str, str | None]]:
    """The same with text for labels that YAML reads as whole numbers, such as those of clusters."""
    for facet, ids in labels.items():
        if facet not in FACETS:
            raise _wrong(f"{where}, labels", f"{facet} is no facet; they are {', '.join(FACETS)}")
        for label, term_id in ids.items():
            at = f"{where}, labels, {facet}"
            if isinstance(label, bool) or not isinstance(label, str | int):
                raise _wrong(at, f"YAML reads a label as {label!r}; put it in quotes")
            if term_id is not None:
                _check_id(facet, term_id, f"{at}, {label}")
    return {facet: {str(label): term_id for label, term_id in ids.items()} for facet, ids in labels.items()}


def _check_constant(name: str, value: str | bool | None, where: str) -> None:
    if name.endswith(ID) or name == "raw_sum":
        raise _wrong(where, "cannot be a constant (the ontology id of a facet stands under the facet's name)")
    if value is None:
        return
    if isinstance(value, bool) != (name == "is_primary_data"):
        raise _wrong(where, f"{value!r} is not {'true or false' if name == 'is_primary_data' else 'text'}")
    if name in FACETS:
        _check_id(name, str(value), where)


def _check_id(facet: str, term_id: str, where: str) -> None:
    """An id, or several joined by `||`, of the ontologies that the facet may hold."""
    prefixes = [prefix for ontology in ONTOLOGIES_OF[facet] for prefix in ONTOLOGIES[ontology]]
    for one in term_id.split("||"):
        if not re.fullmatch(rf"({'|'.join(prefixes)}):\w+", one.strip()) and term_id != UNKNOWN:
            raise _wrong(where, f"{term_id!r} is no ontology id of {facet}, such as {prefixes[0]}:0000000")


def _wrong(where: str, what: str) -> InputError:
    return InputError(f"census.obs_map: {where}: {what}. Keys: {', '.join(_KEYS)}, files")
