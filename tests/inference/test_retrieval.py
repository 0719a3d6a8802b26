"""R@k against its definition, ties included, over every order that they allow."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from langcell.inference.retrieval import hits, retrieval


def _brute_force(score_D: np.ndarray, right_D: np.ndarray, k: int) -> float:
    """Mean over all orders of the answers that keep larger scores before smaller ones."""
    found = [
        right_D[list(order)[:k]].any()
        for order in permutations(range(len(score_D)))
        if (np.diff(score_D[list(order)]) <= 0).all()
    ]
    return float(np.mean(found))


def test_hits_are_the_definition_over_every_order_of_ties() -> None:
    random = np.random.default_rng(0)
    score_QD = random.integers(0, 3, (20, 5)).astype(float)  # three values for five answers: ties everywhere
    right_QD = random.random((20, 5)) < 0.35
    right_QD[0] = False
    for k in (1, 2, 3, 5):
        expected = [_brute_force(s, r, k) for s, r in zip(score_QD, right_QD, strict=True)]
        np.testing.assert_allclose(hits(score_QD, right_QD, k), expected, atol=1e-12)


def test_without_ties_a_hit_is_yes_or_no() -> None:
    random = np.random.default_rng(1)
    score_QD = random.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    right_QD = random.random((50, 30)) < 0.1
    order = np.argsort(-score_QD, axis=1)[:, :5]
    np.testing.assert_allclose(
        hits(score_QD, right_QD, 5), np.take_along_axis(right_QD, order, 1).any(1), atol=1e-12
    )


def test_more_answers_than_there_are_are_all_of_them() -> None:
    np.testing.assert_allclose(hits(np.zeros((1, 3)), np.array([[True, False, False]]), 10), 1.0)
    np.testing.assert_allclose(hits(np.zeros((1, 3)), np.array([[False, False, False]]), 10), 0.0)
    with pytest.raises(ValueError, match="k must be at least 1"):
        hits(np.zeros((1, 3)), np.zeros((1, 3), bool), 0)


def test_a_hundred_thousand_ties_do_not_overflow() -> None:
    right_QD = np.zeros((1, 100_000), bool)
    right_QD[0, :30_000] = True
    np.testing.assert_allclose(hits(np.zeros((1, 100_000)), right_QD, 3), 1 - 0.7**3, rtol=1e-4)


def test_both_directions_of_a_space_that_is_right() -> None:
    """Each cell is its own text: every query finds a right answer first, and chance is what drawing gives."""
    class_N = np.array([0, 0, 0, 1, 2, 2])
    found = retrieval(np.eye(3)[class_N], np.eye(3), class_N, [1, 2])
    assert found["cell_to_text"]["R@1"] == pytest.approx({"value": 1, "balanced": 1, "chance": 1 / 3})
    # of 6 cells one is drawn: 3, 1 and 2 of them are right
    assert found["text_to_cell"]["R@1"] == pytest.approx(
        {"value": 1, "chance": np.mean([3 / 6, 1 / 6, 2 / 6])}
    )
    two = [1 - 3 / 6 * 2 / 5, 1 - 5 / 6 * 4 / 5, 1 - 4 / 6 * 3 / 5]
    assert found["text_to_cell"]["R@2"]["chance"] == pytest.approx(np.mean(two))


def test_cells_of_a_rare_class_weigh_in_the_balanced_figure() -> None:
    class_N = np.array([0] * 9 + [1])
    z_NP = np.tile([[1.0, 0.0]], (10, 1))  # every cell is at the first text
    found = retrieval(z_NP, np.eye(2), class_N, [1])
    assert found["cell_to_text"]["R@1"] == pytest.approx({"value": 0.9, "balanced": 0.5, "chance": 0.5})
    # all cells are equally far from the second text: what it finds first is a matter of chance
    assert found["text_to_cell"]["R@1"] == pytest.approx(
        {"value": (0.9 + 0.1) / 2, "chance": (0.9 + 0.1) / 2}
    )
