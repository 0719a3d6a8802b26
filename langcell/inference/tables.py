"""How zero-shot is measured: five tables, each with what a lazy answer would score.

    seen             test cells of training types, all types as candidates
    unseen           cells of held-out types, the held-out types as candidates
    new_words        cells of held-out types, coarser terms that no training text used
    new_words_seen   test cells of training types, the same terms
    generalised      cells of held-out types, all types as candidates

Each is scored by contrast alone (`ct`) and with matching (`two_step`), and stands beside chance (one
over the candidates) and the best constant answer: with two held-out types a constant is right for
half of them whatever the number of candidates. Cell types are uneven, so balanced accuracy (mean
recall over the types there are) is the figure to read; accuracy and macro-F1 (scikit-learn's, over
the classes that occur as truth or answer) stand beside it. Tables (1) and (4), and the other three,
share their cells: a cell is encoded once for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.embed import tokenize
from langcell.inference.new_words import new_words, only_ancestor
from langcell.inference.options import EvalOptions
from langcell.inference.scoring import Question, Scores, answer
from langcell.text.describe import candidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from langcell.model.langcell import LangCell
    from langcell.text.ontology import Ontology

TABLES = {
    "seen": "test",
    "unseen": "held_out",
    "new_words": "held_out",
    "new_words_seen": "test",
    "generalised": "held_out",
}
"""The tables, each with the split that its cells come from."""
METHODS = ("ct", "two_step")
MEASURES = ("accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class EvalCells:
    """Cells to be judged and what the model was trained on.

    packed: N sentences of genes; term: the CL id of each cell ('' where the ontology has none);
    split: `test` or `held_out` of each cell; train_types: CL ids that have training cells;
    text_terms: CL ids that are the cell type of a training text.
    """

    packed: Packed
    term: list[str]
    split: list[str]
    train_types: list[str]
    text_terms: set[str]


@dataclass(frozen=True)
class Table:
    """One table: n cells, C candidates.

    candidates: CL ids; labels: name of every id here; rows: the cells as indices into `EvalCells`
    (int64[n]); types: own CL id of each; truth: index of the right candidate (int64[n]);
    predicted: per method the index of the answer (int64[n]), empty for an empty table; unscored:
    cells of the split that the table leaves out, by reason; empty: why there is nothing to score,
    else ''; baseline: measures of a supervised method on the same cells (`seen` only, set by whoever
    has the counts: `dataclasses.replace(table, baseline=...)`).
    """

    name: str
    candidates: tuple[str, ...]
    labels: dict[str, str]
    rows: np.ndarray
    types: tuple[str, ...]
    truth: np.ndarray
    predicted: dict[str, np.ndarray]
    unscored: dict[str, int]
    empty: str = ""
    baseline: dict[str, float] | None = None

    @property
    def chance(self) -> float:
        """Accuracy of a random answer: 1 / C."""
        return 1 / len(self.candidates)

    @property
    def constant(self) -> dict[str, float]:
        """Measures of the best constant answer, the most frequent right one."""
        most = np.bincount(self.truth).argmax()
        return measures(self.truth, np.full_like(self.truth, most))

    def measures(self, method: str) -> dict[str, float]:
        """Accuracy, balanced accuracy and macro-F1 of `ct` or `two_step`."""
        return measures(self.truth, self.predicted[method])

    def confusion(self, method: str) -> tuple[list[str], np.ndarray]:
        """Own types that occur (CL ids, R of them) and the counts [R, C] of their answers."""
        types = sorted(set(self.types))
        own = np.searchsorted(types, self.types)
        size = max(len(types), len(self.candidates))
        counts = confusion_matrix(own, self.predicted[method], labels=range(size))
        return types, counts[: len(types), : len(self.candidates)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: per method the measures, `n`, `chance`, `constant` (and `baseline`), nulls if empty."""
        result: dict[str, Any] = {}
        for method in self.predicted:
            result[method] = {
                **(dict.fromkeys(MEASURES) if self.empty else self.measures(method)),
                "chance": None if self.empty else self.chance,
                "constant": None if self.empty else self.constant,
                "n": len(self.rows),
            }
            if self.baseline is not None:
                result[method]["baseline"] = self.baseline
        result["candidates"] = {term: self.labels[term] for term in self.candidates}
        result["unscored"] = self.unscored
        if self.empty:
            result["empty"] = self.empty
        return result


def measures(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall over the classes in `truth`) and macro-F1."""
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": float(
            recall_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
        ),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }


def zero_shot_tables(
    model: LangCell,
    tokenizer: PreTrainedTokenizerBase,
    cells: EvalCells,
    ontology: Ontology,
    options: EvalOptions,
    *,
    tau: float,
    max_length: int,
    two_step: bool,
    seed: int = 0,
) -> dict[str, Table]:
    """The five tables by name, in the order of `TABLES`.

    tau: temperature of the contrast; max_length: most tokens of a candidate text; two_step: whether
    the matching encoder is asked as well; seed: of the sample where a split has more than
    `options.max_cells` scorable cells. A table with no cells or fewer than two candidates is empty
    and says why. Raises InputError for a held-out type or a fixed new word that the ontology does
    not know, or a new word that is not new.
    """
    plans = plan_tables(cells, ontology, options, seed)
    scored = {name: plan for name, plan in plans.items() if not plan.empty}
    terms = sorted({term for plan in scored.values() for term in plan.candidates})
    described = [candidate(term) for term in map(ontology.get, terms) if term is not None]
    texts = tokenize(tokenizer, described, max_length)
    used = np.unique(np.concatenate([np.empty(0, np.int64), *(plan.rows for plan in scored.values())]))
    questions = [
        Question(
            torch.from_numpy(np.searchsorted(used, plan.rows)),
            torch.from_numpy(np.searchsorted(terms, plan.candidates)),
        )
        for plan in scored.values()
    ]
    scores = answer(
        model,
        cells.packed.select(torch.from_numpy(used).to(cells.packed.tokens_T.device)),
        texts,
        questions,
        tau=tau,
        a=options.a if two_step else None,
        top_k=options.top_k,
        batch_tokens=options.batch_tokens,
    )
    answers = dict(zip(scored, map(_predicted, scores), strict=True))
    nothing = {method: np.empty(0, np.int64) for method in METHODS[: 1 + two_step]}
    return {name: replace(plan, predicted=answers.get(name, nothing)) for name, plan in plans.items()}


def plan_tables(
    cells: EvalCells, ontology: Ontology, options: EvalOptions, seed: int = 0
) -> dict[str, Table]:
    """The tables before any answer: cells, candidates and truth of each (see `zero_shot_tables`)."""
    trained = set(cells.train_types)
    found = {term for term, split in zip(cells.term, cells.split, strict=True) if split == "held_out"}
    held_out = _known(ontology, found | _resolved(ontology, options.held_out_types)) - trained
    train_types = _known(ontology, trained)
    all_types = train_types | held_out
    fixed = None if options.new_words == "auto" else list(options.new_words)
    words = new_words(ontology, all_types, cells.text_terms, fixed)
    candidates = {
        "seen": all_types,
        "unseen": held_out,
        "new_words": words,
        "new_words_seen": words,
        "generalised": all_types,
    }
    chosen = {
        "test": _choose(cells, "test", train_types, "no training cell of the type", options.max_cells, seed),
        "held_out": _choose(cells, "held_out", held_out, "type of training cells", options.max_cells, seed),
    }
    return {
        name: _plan(name, cells, *chosen[split], tuple(sorted(candidates[name])), ontology)
        for name, split in TABLES.items()
    }


def _known(ontology: Ontology, terms: Collection[str]) -> set[str]:
    return {term for term in terms if ontology.get(term) is not None}


def _resolved(ontology: Ontology, names: Sequence[str]) -> set[str]:
    """CL ids of cell types given by id or label."""
    found = {name: ontology.find(name, ["CL"]) for name in names}
    for name, term in found.items():
        if term is None:
            raise InputError(f"eval.held_out_types: {name!r} is no id or label of the cell ontology")
    return {term.id for term in found.values() if term is not None}


def _choose(
    cells: EvalCells, split: str, types: set[str], otherwise: str, most: int, seed: int
) -> tuple[np.ndarray, Counter[str]]:
    """Rows of a split whose type is one of `types`, at most `most`, and what is left out (by reason)."""
    here = [row for row, name in enumerate(cells.split) if name == split]
    rows = np.array([row for row in here if cells.term[row] in types], np.int64)
    terms = (cells.term[row] for row in here if cells.term[row] not in types)
    left_out = Counter(otherwise if term else "no ontology term" for term in terms)
    if len(rows) > most:
        left_out["not in the sample"] = len(rows) - most
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return rows, left_out


def _plan(
    name: str,
    cells: EvalCells,
    rows: np.ndarray,
    left_out: Counter[str],
    candidates: tuple[str, ...],
    ontology: Ontology,
) -> Table:
    left_out = left_out.copy()
    right: dict[int, str] = {}
    for row in rows.tolist():
        own = cells.term[row]
        if not name.startswith("new_words"):
            right[row] = own
        elif (only := only_ancestor(own, candidates, ontology)) is not None:
            right[row] = only
        else:
            several = not ontology.ancestors(own).isdisjoint(candidates)
            left_out["several candidates are ancestors" if several else "no candidate is an ancestor"] += 1
    empty = ""
    if len(candidates) < 2:
        empty = f"{len(candidates)} candidate{'s' * (len(candidates) != 1)}, at least two are needed"
        right = {}
    elif not right:
        empty = "no cell to score"
    types = tuple(cells.term[row] for row in right)
    return Table(
        name=name,
        candidates=candidates,
        labels={i: term.label for i in {*candidates, *types} if (term := ontology.get(i)) is not None},
        rows=np.array(list(right), np.int64),
        types=types,
        truth=np.array([candidates.index(term) for term in right.values()], np.int64),
        predicted={},
        unscored=dict(left_out),
        empty=empty,
    )


def _predicted(scores: Scores) -> dict[str, np.ndarray]:
    both = {"ct": scores.ct_NC, "two_step": scores.two_step_NC}
    return {method: score_NC.argmax(1).numpy() for method, score_NC in both.items() if score_NC is not None}
