"""Retrieval in both directions: the text of a cell, and cells of a text.

`R@k` here: the share of queries with a right answer among the first k, by cosine in the joint space.

    cell -> text   query: a cell; answers: the texts of the classes; right: the text of its own class
    text -> cell   query: the text of a class; answers: all cells; right: any cell of that class

A text has many right cells, so `text -> cell` is easy by chance alone and must be read beside it: of 100
cells with 30 of a class, ten drawn at random hold one of them in 97%. Chance is what a score that says
nothing has, which is also how ties are dealt with: answers with equal scores stand in random order, and the
value is the mean over all such orders, worked out exactly (hypergeometric), never the luck of a sort.

Shape suffixes: Q queries, D answers, N cells, C classes, P width of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import gammaln


def hits(score_QD: np.ndarray, right_QD: np.ndarray, k: int) -> np.ndarray:
    """Probability that a right answer is among the first k, equal scores in random order: float64 [Q].

    score_QD: larger is nearer; right_QD: bool. From D answers on k is D. Raises ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    k = min(k, score_QD.shape[1])
    kth_Q1 = -np.partition(-score_QD, k - 1, axis=1)[:, k - 1 : k]
    above_QD, tied_QD = score_QD > kth_Q1, score_QD == kth_Q1
    room_Q = k - above_QD.sum(1)
    n_tied_Q, right_tied_Q = tied_QD.sum(1), (tied_QD & right_QD).sum(1)
    sure_Q = (above_QD & right_QD).any(1)
    return np.where(sure_Q, 1.0, 1 - _all_wrong(n_tied_Q, right_tied_Q, room_Q))


def _all_wrong(n: np.ndarray, right: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Probability that `drawn` of n things, `right` of them right, hold no right one."""
    possible = n - right >= drawn
    wrong = np.where(possible, n - right, drawn)
    log = gammaln(wrong + 1) - gammaln(wrong - drawn + 1) - gammaln(n + 1) + gammaln(n - drawn + 1)
    return np.where(possible, np.exp(log), 0.0)


def retrieval(z_NP: np.ndarray, z_CP: np.ndarray, class_N: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """R@k of both directions, each beside chance.

    z_NP, z_CP: embeddings of cells and of the texts of the classes, of unit length; class_N: int64, class of
    each cell, every class having one at least. `cell_to_text` also has the mean over classes (`balanced`).
    """
    cosine_NC = z_NP @ z_CP.T
    own_NC = class_N[:, None] == np.arange(len(z_CP))
    result: dict[str, Any] = {
        "cell_to_text": {"queries": len(z_NP), "answers": len(z_CP)},
        "text_to_cell": {"queries": len(z_CP), "answers": len(z_NP)},
    }
    for k in ks:
        hit_N = hits(cosine_NC, own_NC, k)
        result["cell_to_text"][f"R@{k}"] = {
            "value": float(hit_N.mean()),
            "balanced": float(np.mean([hit_N[class_N == c].mean() for c in range(len(z_CP))])),
            "chance": float(hits(np.zeros_like(cosine_NC), own_NC, k).mean()),
        }
        result["text_to_cell"][f"R@{k}"] = {
            "value": float(hits(cosine_NC.T, own_NC.T, k).mean()),
            "chance": float(hits(np.zeros_like(cosine_NC.T), own_NC.T, k).mean()),
        }
    return result
