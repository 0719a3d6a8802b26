"""Ontology releases, read into one form of record, by two roads.

`Packaged` is the default: `cellxgene-ontology-guide` ships the releases that CELLxGENE itself
validates against, so its ids are the Census's, and nothing is downloaded. All eight ontologies
(74k terms) load in 0.7 s; each loads when its first term is asked for. `read_obo` parses OBO
Foundry releases with pronto: Cell Ontology 2024-04-05 (3 MB OWL, gzip) takes 7 s and 440 MB.

What "ancestors" are. The package merges two relations, is_a and part_of (BFO:0000050), into one
set per term, cut to terms of the same ontology, and cannot tell them apart afterwards. So the
pronto road takes the same closure: of the same release both roads say the same, field by field, of the
1,887 terms in use of PATO 2025-05-14, the 239 of HsapDv (is_a alone would lose ancestors of 237) and
the 953 shared ones of HANCESTRO 2025-04-01. In the Cell Ontology, where ancestry decides which texts
are true of a cell, part_of adds to the ancestors of 8 of 2,998 terms, none of them a cell type
(nuclei and cytoplasms, parts of `cell`): there, ancestors are the is_a ancestors.

A term is taken from its own ontology's release alone, as in the package: the copies of UBERON, GO
and other terms that a merged release such as `cl.owl` carries may be older, and are left out.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, TypedDict

import pronto
from cellxgene_ontology_guide.ontology_parser import OntologyParser

from langcell.errors import InputError

ONTOLOGIES: dict[str, tuple[str, ...]] = {
    "CL": ("CL",),
    "EFO": ("EFO",),
    "HsapDv": ("HsapDv",),
    "MmusDv": ("MmusDv",),
    "UBERON": ("UBERON",),
    "MONDO": ("MONDO",),
    "PATO": ("PATO",),
    "HANCESTRO": ("HANCESTRO", "AfPO"),
}
"""The ontologies of the eight facets, of man and mouse, each with the id prefixes that it defines."""

STAGES_OF = {"homo_sapiens": "HsapDv", "mus_musculus": "MmusDv"}
"""The ontology of each organism's stages of life."""
PART_OF = ("part_of", "BFO:0000050")
TIMEOUT_S = 60
"""Longest silence of a server that a release is read from."""


class Record(TypedDict, total=False):
    """One term, in the form of the package's own JSON (fields that stand in no text left out)."""

    label: str
    description: str
    synonyms: list[str]
    """Exact synonyms only: broader and narrower ones name something else."""
    ancestors: Iterable[str]
    deprecated: bool
    replaced_by: str


class Release(Protocol):
    """One release of one ontology."""

    @property
    def ontology(self) -> str:
        """Key of `ONTOLOGIES`."""

    @property
    def version(self) -> str:
        """Version of the release, e.g. `2025-05-14`."""

    @property
    def records(self) -> Mapping[str, Record]:
        """Every term by id, obsolete ones too."""


@cache
def _package() -> OntologyParser:
    return OntologyParser()


@dataclass(frozen=True)
class Packaged:
    """The release of `ontology` that the installed `cellxgene-ontology-guide` ships."""

    ontology: str

    @property
    def version(self) -> str:
        return _version(_package().cxg_schema.supported_ontologies[self.ontology]["version"])

    @property
    def records(self) -> Mapping[str, Record]:
        return _package().cxg_schema.ontology(self.ontology)  # read once per process by the package


@dataclass(frozen=True)
class Parsed:
    """A release that was read from a file."""

    ontology: str
    version: str
    records: Mapping[str, Record]


def read_obo(source: str) -> Parsed:
    """Read one OBO Foundry release.

    Args:
        source: path or URL of an OBO, OWL (RDF/XML) or OBO Graphs JSON file, plain or compressed
            (gzip, bzip2, xz). `owl:imports` are not followed: the Foundry's main releases are merged.

    Raises:
        InputError: no such file, a file that pronto cannot parse (with its reason and line), or one
            that is not a release of one of `ONTOLOGIES`.
    """
    if "://" not in source and not Path(source).is_file():
        raise InputError(f"{source}: no such file; give an OBO or OWL release, as a path or a URL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 17,404 of CL's axioms and annotations stand in no text
            parsed = pronto.Ontology(source, import_depth=0, timeout=TIMEOUT_S, encoding="utf-8")
            ontology = _ontology_of(source, parsed.metadata.ontology)
            records = _records(parsed, ONTOLOGIES[ontology])
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever a parser throws at a damaged file is the file's fault
        raise InputError(f"{source}: cannot be read as an ontology release: {_reason(error)}") from error
    version = _version(parsed.metadata.data_version or "") or f"content {_digest(records)}"
    return Parsed(ontology, version, records)


def _ontology_of(source: str, header: str | None) -> str:
    """Which ontology a release says it is: `cl`, `cl/cl-basic`, `http://www.ebi.ac.uk/efo/efo.owl`."""
    words = re.split(r"[^a-z]+", (header or "").lower())
    for name in ONTOLOGIES:
        if name.lower() in words:
            return name
    raise InputError(
        f"{source}: its header names the ontology {header!r}, which is none of {', '.join(ONTOLOGIES)}"
    )


def _records(parsed: pronto.Ontology, prefixes: tuple[str, ...]) -> dict[str, Record]:
    """Records of the terms whose prefix is in `prefixes`, with ids as CURIEs."""
    part_of = [relation for relation in parsed.relationships() if relation.id in PART_OF]
    parents: dict[str, set[str]] = {}
    records: dict[str, Record] = {}
    for term in parsed.terms():
        term_id = _curie(term.id)
        above = {parent.id for parent in term.superclasses(distance=1, with_self=False)}
        for relation in part_of:
            if relation in term.relationships:
                above |= term.relationships[relation].ids
        parents[term_id] = {_curie(parent) for parent in above}
        if not _of(term_id, prefixes):
            continue
        record: Record = {"label": term.name or "", "deprecated": term.obsolete}
        if term.definition:
            record["description"] = str(term.definition)
        record["synonyms"] = sorted(s.description for s in term.synonyms if s.scope == "EXACT")
        if term.replaced_by.ids:
            record["replaced_by"] = _curie(min(term.replaced_by.ids))
        records[term_id] = record
        for merged in term.alternate_ids:  # OBO's way to write an obsolete term merged into this one
            records.setdefault(
                _curie(merged), {"label": "", "deprecated": True, "ancestors": (), "replaced_by": term_id}
            )
    for term_id, record in records.items():
        if term_id in parents:
            record["ancestors"] = [a for a in _closure(term_id, parents) if _of(a, prefixes)]
    return records


def _closure(term_id: str, parents: Mapping[str, set[str]]) -> list[str]:
    """Everything reachable from a term over `parents`, without the term itself."""
    seen, queue = {term_id}, [term_id]
    for node in queue:  # grows while it is walked
        new = parents.get(node, set()) - seen
        seen |= new
        queue.extend(sorted(new))
    return queue[1:]


def _of(term_id: str, prefixes: tuple[str, ...]) -> bool:
    return term_id.partition(":")[0] in prefixes


def _curie(term_id: str) -> str:
    """`http://www.ebi.ac.uk/efo/EFO_0009922` -> `EFO:0009922`: pronto shortens only the Foundry's IRIs."""
    if "://" not in term_id:
        return term_id
    return re.sub(r"^.*[/#]([A-Za-z]+)_(\w+)$", r"\1:\2", term_id)


def _version(text: str) -> str:
    """`releases/2025-05-14/pato.obo`, `v2025-05-14` -> `2025-05-14`; `v3.90.0` -> `3.90.0`; else `''`."""
    found = re.search(r"\d{4}-\d{2}-\d{2}|\d+(\.\d+)+", text)
    return found.group() if found else ""


def _digest(records: Mapping[str, Record]) -> str:
    """Hash of the records' content, which names a release that states no version."""
    return hashlib.blake2b(json.dumps(records, sort_keys=True).encode(), digest_size=8).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        text = f": {error.text.strip()}" if error.text else ""
        return f"line {error.lineno}: {error.msg}{text}"
    return f"{type(error).__name__}: {error}"
