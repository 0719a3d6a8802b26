"""Metadata of a cell -> its text, and a cell type (tissue, disease, ...) -> its zero-shot candidate.

One form for both, LangCell's own: `facet: NAME. DEFINITION; ` per facet, the candidate being one
part alone. NAME and DEFINITION are the ontology's, so that the same term reads the same
whatever release a data set was labelled with; a final period of the definition is kept, never doubled.
Several values of a facet (`influenza || pneumonia`) are several such parts.

Nothing false is said. What the id names decides; a label is looked up only where there is no id, or one
of the right ontology that this release does not know. A value that leads to no term keeps the name it
was given, without a definition; one that leads to two (the label is another term's label than the id's)
and one that says it is unknown are left out. `Value.outcome` and `Coverage` count each case: in 19,227
donor rows of the Census (labels alone; 11,260 texts, 60 us a row) 2,112 ages and sexes are `unknown`,
95 diseases have no definition, and everything else is named and defined.

A text's id is a hash of the text, so any worker can make it and equal texts have equal ids. Shortened
variants (training must know texts as short as candidates) keep the cell type and a random part of the
other facets, drawn from the text's id alone: the same row gives the same variants in any process.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

from langcell.errors import InputError
from langcell.text.ontology import Ontology, Term
from langcell.text.options import FACETS, TextOptions

ONTOLOGIES_OF: dict[str, tuple[str, ...]] = {
    "cell_type": ("CL",),
    "assay": ("EFO",),
    "development_stage": ("HsapDv", "MmusDv", "UBERON"),
    "tissue": ("UBERON", "CL"),
    "tissue_general": ("UBERON",),
    "disease": ("MONDO", "PATO"),
    "sex": ("PATO",),
    "self_reported_ethnicity": ("HANCESTRO",),
}
"""The ontologies whose terms each facet may hold (CELLxGENE's schema, human and mouse data)."""

UNKNOWN = frozenset({"", "unknown", "na", "n/a", "nan", "none", "null", "<na>"})
"""Values, in lower case, that say nothing."""

MOST_UNRESOLVED = 5
"""Values without a term that `coverage_lines` names."""

Outcome = Literal["defined", "named", "unresolved", "conflict", "unknown"]


class Value(NamedTuple):
    """One value of one facet, and what became of it."""

    facet: str
    name: str
    """What stands in the text; empty where the value was left out."""
    id: str
    """Ontology id of the term it resolved to, else empty."""
    outcome: Outcome
    """`defined`: a term with a definition. `named`: a term without one. `unresolved`: no term, the
    given name stands. `conflict`: label and id name different terms, left out. `unknown`: left out."""
    given: str = ""
    """Where there is no term: the id as given, or the label if there was no id."""
    reason: str = ""
    """Where there is no term: why."""


@dataclass(frozen=True, slots=True)
class Description:
    """The text of a cell."""

    text: str
    """All facets; empty if no value of the row says anything."""
    variants: tuple[str, ...]
    """`options.short_variants` shortened texts, the last the cell type alone; the text itself if the
    row has no cell type. They go under the text's id."""
    values: tuple[Value, ...]
    """Every value of every facet of the options, in the order of the text."""

    @property
    def text_id(self) -> int:
        return text_id(self.text)

    @property
    def term(self) -> str:
        """Cell Ontology id of the cell type, or an empty string."""
        return next((value.id for value in self.values if value.facet == "cell_type"), "")

    @property
    def unresolved(self) -> tuple[tuple[str, str, str], ...]:
        """(facet, id or label as given, reason) of the values that have no term, unknown ones aside."""
        return tuple((v.facet, v.given, v.reason) for v in self.values if v.reason)


def text_id(text: str) -> int:
    """Signed 64-bit id of a text: blake2b of its UTF-8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def candidate(term: Term, facet: str = "cell_type") -> str:
    """The zero-shot candidate of a term, `cell type: NAME. DEFINITION; ` (`tissue: ...`, `disease: ...`)."""
    return _sentence(facet, term.label, term.definition)


def describe(
    row: Mapping[str, tuple[str | None, str | None]], ontology: Ontology, options: TextOptions
) -> Description:
    """Write the text of a row of obs.

    Args:
        row: (label, ontology id) by facet; either may be missing (None, NaN, `unknown`, `na`, ...),
            a facet too. Several values in one are joined by `||`.
        ontology: where terms are looked up.
        options: which facets stand in the text, which of them with a definition, how many variants.

    Raises:
        InputError: the options name a facet that is not one of `FACETS`, one twice, or no `cell_type`.
    """
    _check(tuple(options.facets), tuple(options.define))
    values: list[Value] = []
    parts: list[tuple[str, str]] = []
    for facet in options.facets:
        names: set[str] = set()
        for label, term_id in _split(*row.get(facet, (None, None))):
            value, definition = _resolve(facet, label, term_id, ontology)
            if value.name and value.name in names:
                continue
            names.add(value.name)
            values.append(value)
            if value.name:
                defined = definition if facet in options.define else None
                parts.append((facet, _sentence(facet, value.name, defined)))
    text = "".join(sentence for _, sentence in parts)
    return Description(text, _variants(text, parts, options.short_variants), tuple(values))


@dataclass
class Coverage:
    """How many cells had each outcome in each facet, and which values found no term."""

    cells: int = 0
    empty: int = 0
    """Cells without any text."""
    facets: dict[str, Counter[str]] = field(default_factory=dict)
    unresolved: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, description: Description, cells: int = 1) -> None:
        """Count a text that `cells` cells have."""
        self.cells += cells
        self.empty += cells * (not description.text)
        for value in description.values:
            self.facets.setdefault(value.facet, Counter())[value.outcome] += cells
        for triple in description.unresolved:
            self.unresolved[triple] += cells

    def to_dict(self) -> dict[str, object]:
        """Plain containers for a manifest, in an order that does not depend on that of counting."""
        ranked = sorted(self.unresolved.items(), key=lambda item: (-item[1], item[0]))
        return {
            "cells": self.cells,
            "empty": self.empty,
            "facets": {f: dict(sorted(self.facets[f].items())) for f in FACETS if f in self.facets},
            "unresolved": [
                {"facet": facet, "value": given, "reason": reason, "cells": cells}
                for (facet, given, reason), cells in ranked
            ],
        }


def coverage_lines(coverage: Mapping[str, Any]) -> str:
    """A `Coverage.to_dict()` in words: what each facet resolved to, and the values most cells lack a term
    for."""
    lines = []
    for facet, outcomes in coverage["facets"].items():
        total = sum(outcomes.values())
        parts = (f"{outcome} {100 * n / total:.3g}%" for outcome, n in outcomes.items())
        lines.append(f"{facet:<24} {', '.join(parts)}")
    for value in coverage["unresolved"][:MOST_UNRESOLVED]:
        lines.append(
            f"  no term: {value['facet']} {value['value']!r}, {value['cells']:,} cells: {value['reason']}"
        )
    if (more := len(coverage["unresolved"]) - MOST_UNRESOLVED) > 0:
        lines.append(f"  and {more} more values (manifest.json)")
    return "\n".join(lines)


@cache
def _check(facets: tuple[str, ...], define: tuple[str, ...]) -> None:
    for option, names in (("text.facets", facets), ("text.define", define)):
        strange = [name for name in names if name not in FACETS]
        if strange:
            raise InputError(f"{option}: {', '.join(strange)} not known; the facets are {', '.join(FACETS)}")
    if len(set(facets)) < len(facets) or "cell_type" not in facets:
        raise InputError(f"text.facets: each facet once and cell_type among them, not {', '.join(facets)}")


def _clean(value: object) -> str:
    """A value of obs as single-spaced text; empty if it is no string (None, NaN, pandas.NA)."""
    return " ".join(value.split()) if isinstance(value, str) else ""


def _split(label: object, term_id: object) -> list[tuple[str, str]]:
    """The single (label, id) pairs of a facet. Ids are dropped if they do not match the labels one to one.

    CELLxGENE joins diseases by ` || ` and, in older releases, ethnicities by commas. Commas also stand
    inside labels, never inside ids, so the number of ids decides.
    """
    labels, ids = _clean(label).split("||"), _clean(term_id).replace(",", "||").split("||")
    if len(ids) > len(labels) == 1:
        by_comma = labels[0].split(",")
        labels = by_comma if len(by_comma) == len(ids) else labels
    if labels == [""]:
        labels = [""] * len(ids)
    if len(ids) != len(labels):
        ids = [""] * len(labels)
    return [(a.strip(), b.strip()) for a, b in zip(labels, ids, strict=True)]


def _resolve(facet: str, label: str, term_id: str, ontology: Ontology) -> tuple[Value, str | None]:
    """What one (label, id) pair means, and its definition."""
    if term_id.casefold() in UNKNOWN:
        term_id = ""
    if label.casefold() in UNKNOWN and (label or not term_id):
        return Value(facet, "", "", "unknown"), None
    within = ONTOLOGIES_OF[facet]
    own = [name for name in within if not term_id or ontology.covers(term_id, [name])]
    named = ontology.find(label, own) if label else None
    term, reason = named, "no term of this name"
    if term_id:
        term, reason = ontology.get(term_id), "id not in the ontology"
        if not own:
            term, reason = None, "id of another ontology"
        elif term and not ontology.covers(term.id, within):
            term, reason = None, "replaced by a term of another ontology"
        elif term and named and named.id != term.id and named.label.casefold() == label.casefold():
            return Value(facet, "", "", "conflict", term_id, f"label and id differ: {label}"), None
        elif term is None and ontology.is_obsolete(term_id):
            reason = "obsolete without replacement"
        elif term is None:
            term = named
    if term is None:
        return Value(facet, label, "", "unresolved", term_id or label, reason), None
    return Value(facet, term.label, term.id, "defined" if term.definition else "named"), term.definition


def _sentence(facet: str, name: str, definition: str | None) -> str:
    head = f"{facet.replace('_', ' ')}: {name}"
    if not definition:
        return f"{head}; "
    body = definition.rstrip(";")
    if body.endswith("."):
        body = body.rstrip(".") + "."
    return f"{head.rstrip('.')}. {body}; "


def _variants(text: str, parts: Sequence[tuple[str, str]], count: int) -> tuple[str, ...]:
    """`count` shortened texts: each facet beside the cell type goes with probability 1/2, at least one."""
    alone = "".join(sentence for facet, sentence in parts if facet == "cell_type")
    if count < 1 or not alone:
        return (text,) * max(count, 0)
    others = [facet for facet in dict(parts) if facet != "cell_type"]
    draw = random.Random(text_id(text)).random  # its sequence is fixed by Python's documentation
    variants = []
    for _ in range(count - 1):
        kept = {facet for facet in others if draw() < 0.5}
        if others and len(kept) == len(others):
            kept.discard(others[int(draw() * len(others))])
        variants.append("".join(s for facet, s in parts if facet == "cell_type" or facet in kept))
    return (*variants, alone)
