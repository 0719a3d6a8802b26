"""Candidates: what a cell may be called, as names, ids, descriptions or a file, and the text of each.

A name or id that the cell ontology knows becomes the sentence that training used, name and definition;
anything else is taken at its word, as a description in the user's own. An id that is not in the ontology, or
no longer, is refused: as free text `CL:0000999` would mean nothing and still get a score.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from langcell.errors import InputError
from langcell.text.describe import candidate
from langcell.text.ontology import Ontology, Term

_ID = re.compile(r"[A-Za-z]+:\d{5,}")


@dataclass(frozen=True)
class Candidate:
    """label: what a cell is called in obs; text: what the model reads; term: CL id, '' for free text."""

    label: str
    text: str
    term: str = ""


def read_candidates(given: Iterable[str] | Mapping[str, str], ontology: Ontology) -> list[Candidate]:
    """Candidates in the order given.

    given: names, CL ids and descriptions; or label -> any of these, where cells shall be called by labels of
    one's own. Raises InputError for a blank text, an id that the ontology does not know, one label or term
    given twice, and fewer than two candidates.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, text) for text in given]
    for label, text in pairs:
        if not isinstance(text, str) or not text.strip():
            of = "" if label is None else f" of {label!r}"
            raise InputError(f"candidates: {text!r}{of} is no text; give names, CL ids or descriptions")
    found = [_candidate(label, text.strip(), ontology) for label, text in pairs]
    if len(found) < 2:
        raise InputError(f"candidates: {len(found)} given; a choice needs two at least")
    for what in ("label", "term"):
        seen: set[str] = set()
        for one in found:
            key = getattr(one, what)
            if key and key in seen:
                raise InputError(f"candidates: {one.label} ({key}) stands twice; give each once")
            seen.add(key)
    return found


def read_file(path: str | Path) -> dict[str, str] | list[str]:
    """Candidates of a file: one a line, or two columns with a tab between, label and candidate. Lines that
    begin with # are left out. Raises InputError."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"candidates: {path} cannot be read: {error}") from error
    rows = [
        [part.strip() for part in line.split("\t")]
        for line in lines
        if line.strip() and not line.startswith("#")
    ]
    if rows and all(len(row) == 2 for row in rows):
        if len({row[0] for row in rows}) < len(rows):
            raise InputError(f"candidates: {path} has a label twice")
        return dict(rows)
    if any(len(row) > 1 for row in rows):
        raise InputError(
            f"candidates: {path}: every line has one column, or every line two (label, candidate)"
        )
    return [row[0] for row in rows]


def _candidate(label: str | None, text: str, ontology: Ontology) -> Candidate:
    term = ontology.find(text, ["CL"])
    if term is not None:
        return of_term(term, label)
    if _ID.fullmatch(text):
        gone = " any more (it is obsolete)" if ontology.is_obsolete(text) else ""
        raise InputError(
            f"candidates: {text} is not a term of the cell ontology{gone}; give a CL id or a name"
        )
    return Candidate(label or text, text)


def of_term(term: Term, label: str | None = None) -> Candidate:
    """The candidate of a cell type."""
    return Candidate(label or term.label, candidate(term), term.id)
