"""Which pathways are active in a cell, as several yes-or-no questions at once.

Nobody has measured the activity of a pathway in these cells, so the answer is made of their counts: a cell's
score is the mean, over the set's genes, of the gene's log-normalised count in standard deviations from its
mean, and it is `high` above the upper quartile; means, deviations and quartile are of the training cells
alone. The table therefore says how much of such a score a method keeps, not how well biology is known:
logistic regression on the counts themselves sees what the label was made of, and is a ceiling rather than a
rival. Columns of obs (labels that someone gave) are taken as they are.

Shape suffixes: N cells, G genes, L pathways or labels, P width of the joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from langcell.cells.symbols import ID_COLUMNS, NAME_COLUMNS, names_in
from langcell.errors import InputError
from langcell.inference.measures import multilabel_measures

Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(training rows, their labels [.., L], test rows) -> probability of each label for the test rows [.., L]."""
QUARTILE = 0.75
"""Quantile of the training cells' scores above which a pathway is high."""
FEWEST_GENES = 3
"""Genes of a set that the file must have (genes)."""


def read_gmt(path: str) -> dict[str, list[str]]:
    """Genes of each set: lines of name, description and genes, with tabs between. Raises InputError."""
    try:
        with open(path) as file:
            lines = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"evaluate.pathways: {path} cannot be read: {error}") from error
    if not lines or any(len(line) < 3 for line in lines):
        raise InputError(
            f"evaluate.pathways: {path} is no .gmt file: name, description and genes with tabs between"
        )
    return {name: [gene for gene in genes if gene] for name, _, *genes in lines}


def set_columns(sets: Mapping[str, Sequence[str]], var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of each set's genes (int64), of the sets of which `FEWEST_GENES` are there.

    Genes are named as var's index or one of its columns of ids and symbols, whichever finds the most.
    """
    usual = [var[column] for column in (*ID_COLUMNS, *NAME_COLUMNS) if column in var]
    namings = [np.array(names_in(naming)) for naming in (var.index, *usual)]
    members = {gene for genes in sets.values() for gene in genes}
    names = max(namings, key=lambda naming: np.isin(naming, list(members)).sum())
    columns = {name: np.flatnonzero(np.isin(names, list(genes))) for name, genes in sets.items()}
    return {name: found for name, found in columns.items() if len(found) >= FEWEST_GENES}


def high_NL(features_NG: sp.csr_matrix, columns: Sequence[np.ndarray], train: np.ndarray) -> np.ndarray:
    """Whether each pathway is high in each cell, as above (bool [N, L])."""
    result = np.empty((features_NG.shape[0], len(columns)), bool)
    for i, genes in enumerate(columns):
        x_NG = features_NG[:, genes].toarray()
        deviation_G = x_NG[train].std(0)
        z_NG = (x_NG - x_NG[train].mean(0)) / np.where(deviation_G > 0, deviation_G, 1)
        score_N = z_NG.mean(1)
        result[:, i] = score_N > np.quantile(score_N[train], QUARTILE)
    return result


def stated_NL(obs: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Columns of obs as yes or no (bool [N, L]). Raises InputError for a column that is not there or holds
    anything but true and false, or 0 and 1."""
    for name in columns:
        if name not in obs or not set(obs[name].unique()) <= {0, 1}:
            raise InputError(
                f"evaluate.pathway_columns: obs[{name!r}] must hold true and false, or 0 and 1, of every cell"
            )
    return np.stack([obs[name].to_numpy(bool) for name in columns], axis=1)


def heads(x: np.ndarray | sp.csr_matrix, seed: int) -> Score:
    """A logistic head a pathway on a frozen space [N, ...]."""

    def score(train: np.ndarray, label_SL: np.ndarray, test: np.ndarray) -> np.ndarray:
        scaler = StandardScaler(with_mean=not sp.issparse(x))
        columns = []
        for label_S in label_SL.T:
            head = make_pipeline(scaler, LogisticRegression(C=1.0, max_iter=2000, random_state=seed))
            columns.append(head.fit(x[train], label_S).predict_proba(x[test])[:, 1])
        return np.stack(columns, axis=1)

    return score


def multi_label(
    methods: Mapping[str, Score], label_NL: np.ndarray, train: np.ndarray, test: np.ndarray
) -> dict[str, Any]:
    """`multilabel_measures` of each method; a result whose `empty` says why where no pathway is left.

    label_NL: bool. Pathways that are always or never high among training or test cells are left out and
    counted. `constant` says that every pathway is high: its AUROC is 0.5, its average precision the
    prevalence.
    """
    mixed = [
        i for i in range(label_NL.shape[1]) if all(0 < label_NL[rows, i].mean() < 1 for rows in (train, test))
    ]
    if not mixed:
        return {"empty": "no pathway is high in some and low in other cells of both splits"}
    learnt, truth = label_NL[train][:, mixed], label_NL[test][:, mixed]
    found = {"constant": multilabel_measures(truth, np.ones(truth.shape))}
    found |= {name: multilabel_measures(truth, score(train, learnt, test)) for name, score in methods.items()}
    return {
        "pathways": len(mixed),
        "one_valued": label_NL.shape[1] - len(mixed),
        "n": len(test),
        "methods": found,
    }
