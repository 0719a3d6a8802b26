"""Candidates in words that no training text used: coarser terms of the cell-type ontology.

A model that has learnt names only cannot place a cell under a term that it never read; one that
has learnt what the words mean can. The terms come from the ontology, not from a list chosen by
looking at results: those that cover the most types first, and of these the deepest, which says the
most. "Hematopoietic cell" covers all types of a blood sample and says nothing, hence the limit of
half the types.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from langcell.errors import InputError

if TYPE_CHECKING:
    from langcell.text.ontology import Ontology

CELL_TYPE = "CL:"


def new_words(
    ontology: Ontology, types: Collection[str], text_terms: Collection[str], fixed: Sequence[str] | None
) -> list[str]:
    """Ids of the coarser terms, an antichain of which none is in `text_terms`.

    types: CL ids of all cell types of the corpus, held-out ones included. text_terms: CL ids that
    are the cell type of a training text. fixed: the terms to take instead of the rule; None: the
    rule, which may find none. Raises InputError where a fixed term is unknown, stands in a training
    text or is related to another one.
    """
    if fixed is not None:
        return _checked(ontology, text_terms, fixed)
    covered: dict[str, set[str]] = {}
    for term in set(types):
        for ancestor in ontology.ancestors(term):
            covered.setdefault(ancestor, set()).add(term)
    most = len(set(types)) / 2
    offered = [
        term
        for term, below in covered.items()
        if len(below) <= most
        and term.startswith(CELL_TYPE)
        and term not in text_terms
        and ontology.get(term) is not None
    ]
    offered.sort(key=lambda term: (-len(covered[term]), -ontology.depth(term), term))
    taken: list[str] = []
    for term in offered:
        if not any(ontology.related(term, other) or covered[term] & covered[other] for other in taken):
            taken.append(term)
    return taken


def only_ancestor(term: str, candidates: Collection[str], ontology: Ontology) -> str | None:
    """The one candidate that is an ancestor of `term`; None if none or several are."""
    found = ontology.ancestors(term).intersection(candidates)
    return next(iter(found)) if len(found) == 1 else None


def _checked(ontology: Ontology, text_terms: Collection[str], fixed: Sequence[str]) -> list[str]:
    taken: list[str] = []
    for name in fixed:
        found = ontology.get(name)
        if found is None:
            raise InputError(f"eval.new_words: {name!r} is not a term of the ontology; give CL ids or `auto`")
        if found.id in text_terms:
            raise InputError(f"eval.new_words: {name} is the cell type of a training text; take it out")
        for other in taken:
            if ontology.related(found.id, other):
                raise InputError(
                    f"eval.new_words: one of {other} and {name} is an ancestor of the other; take one out"
                )
        if found.id not in taken:
            taken.append(found.id)
    return taken
