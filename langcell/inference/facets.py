"""Zero-shot for any facet: cell types, tissues, diseases and the rest, each by its own words.

The candidates of a facet are the terms that its cells have, each a sentence as the released code has it
(`tissue: NAME. DEFINITION; `). Labels become terms by the rules of training texts (`langcell.text.describe`),
so a label means here what it meant there; one that leads to no term has no definition to read, and its cells
are left out and counted, never guessed at. All questions about a cell are asked at once: it is encoded once,
and a (cell, text) pair that two of them share is matched once.

Shape suffixes: N cells, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.embed import tokenize
from langcell.inference.pretrained import Pretrained
from langcell.inference.scoring import Question, answer
from langcell.inference.tables import Table
from langcell.text.describe import ONTOLOGIES_OF, candidate, describe
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

NO_VARIANTS = TextOptions(short_variants=0)


@dataclass(frozen=True)
class Facet:
    """Which term each cell has in one facet.

    term_N: ontology ids, '' for a cell that has none or is not asked about; labels, texts: name and candidate
    text of every term that a cell has; left_out: cells without a term, by label and why.
    """

    facet: str
    term_N: tuple[str, ...]
    labels: dict[str, str]
    texts: dict[str, str]
    left_out: dict[str, int]

    def only(self, terms: Collection[str]) -> Facet:
        """The same question about the cells of these terms alone, and with these as candidates."""
        return replace(
            self,
            term_N=tuple(term if term in terms else "" for term in self.term_N),
            labels={term: name for term, name in self.labels.items() if term in terms},
            texts={term: text for term, text in self.texts.items() if term in terms},
        )

    @property
    def rows(self) -> np.ndarray:
        """Cells that have a term (int64)."""
        return np.flatnonzero(np.array(self.term_N, dtype=object) != "")


def resolve(
    facet: str,
    label_N: Sequence[object],
    id_N: Sequence[object] | None,
    given: Mapping[str, str],
    ontology: Ontology,
) -> Facet:
    """The terms of one obs column.

    label_N: the column, id_N: ontology ids beside it (None: there is no such column), given: ids of labels
    that the user states, before anything else. A label may be an id, a name or an exact synonym. Raises
    InputError for a facet that is none, and for a stated id that the facet's ontologies do not know.
    """
    if facet not in ONTOLOGIES_OF:
        raise InputError(f"evaluate.facets: {facet!r} is no facet; they are {', '.join(ONTOLOGIES_OF)}")
    pairs = list(zip(label_N, [None] * len(label_N) if id_N is None else id_N, strict=True))
    found = {pair: _term(facet, *pair, given, ontology) for pair in set(pairs)}
    without = Counter(f"{label}: {found[label, i][1]}" for label, i in pairs if not found[label, i][0])
    terms = [term for i in sorted({i for i, _ in found.values()}) if (term := ontology.get(i)) is not None]
    return Facet(
        facet=facet,
        term_N=tuple(found[pair][0] for pair in pairs),
        labels={term.id: term.label for term in terms},
        texts={term.id: candidate(term, facet) for term in terms},
        left_out=dict(without),
    )


def _term(
    facet: str, label: object, term_id: object, given: Mapping[str, str], ontology: Ontology
) -> tuple[str, str]:
    """The ontology id of a value, and why there is none."""
    stated = given.get(label) if isinstance(label, str) else None
    if stated is None and isinstance(label, str) and ontology.covers(label, ONTOLOGIES_OF[facet]):
        label, term_id = None, label
    row = {facet: (None, stated) if stated else (_text(label), _text(term_id))}
    values = [value for value in describe(row, ontology, NO_VARIANTS).values if value.facet == facet]
    if len(values) == 1 and values[0].id:
        return values[0].id, ""
    if stated:
        raise InputError(
            f"evaluate.terms: {label!r} is said to be {stated!r}, which is no id of "
            f"{' or '.join(ONTOLOGIES_OF[facet])}"
        )
    return "", "several values" if len(values) > 1 else values[0].reason or "says nothing"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def zero_shot_facets(
    model: Pretrained,
    cells: Packed,
    asked: Mapping[str, Facet],
    *,
    a: float,
    top_k: int,
    batch_tokens: int,
) -> dict[str, Table]:
    """One table a question, by the same names, with both scores (`ct`, `two_step`).

    cells: N sentences of genes. a: weight of the contrast among the `top_k` candidates that are matched;
    batch_tokens: as in `scoring.answer`. A question with fewer than two candidates is an empty table.
    """
    plans = {name: _plan(name, facet) for name, facet in asked.items()}
    scored = {name: plan for name, plan in plans.items() if not plan.empty}
    if not scored:
        return plans
    texts = list(
        dict.fromkeys(asked[name].texts[t] for name, plan in scored.items() for t in plan.candidates)
    )
    questions = [
        Question(
            torch.from_numpy(plan.rows),
            torch.tensor([texts.index(asked[name].texts[term]) for term in plan.candidates]),
        )
        for name, plan in scored.items()
    ]
    scores = answer(
        model.model,
        cells,
        tokenize(model.tokenizer, texts, model.text.max_length),
        questions,
        tau=model.tau,
        a=a,
        top_k=top_k,
        batch_tokens=batch_tokens,
    )
    for name, score in zip(scored, scores, strict=True):
        assert score.two_step_NC is not None
        plans[name] = replace(
            plans[name],
            predicted={
                "ct": score.ct_NC.argmax(1).numpy(),
                "two_step": score.two_step_NC.argmax(1).numpy(),
            },
        )
    return plans


def _plan(name: str, facet: Facet) -> Table:
    """The table before any answer."""
    candidates = tuple(sorted(set(facet.term_N) - {""}))
    empty = "" if len(candidates) > 1 else f"{len(candidates)} candidate, at least two are needed"
    rows = facet.rows if not empty else np.empty(0, np.int64)
    types = tuple(facet.term_N[row] for row in rows)
    place = {term: i for i, term in enumerate(candidates)}
    return Table(
        name=name,
        candidates=candidates,
        labels=facet.labels,
        rows=rows,
        types=types,
        truth=np.array([place[term] for term in types], np.int64),
        predicted={} if not empty else dict.fromkeys(("ct", "two_step"), np.empty(0, np.int64)),
        unscored=facet.left_out,
        empty=empty,
    )
