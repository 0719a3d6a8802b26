"""Shots are drawn as they are said to be, and prototypes are what NumPy says."""

from __future__ import annotations

import numpy as np

from langcell.inference.prototypes import draw_shots, nearest_prototype, taking_part

CLASS = np.array([0] * 12 + [1] * 7 + [2] * 6 + [-1] * 5 + [3] * 40)


def test_shots_are_equal_per_class_and_never_tested() -> None:
    draw = draw_shots(CLASS, 5, seed=3)
    assert draw.order_CS.shape == (3, 5)  # of class 2 five of six could be shown and one tested: too few
    for c, rows in zip((0, 1, 3), draw.order_CS, strict=True):
        assert (CLASS[rows] == c).all()
        assert len(set(rows)) == 5
    for k in (1, 3, 5):
        shown = draw.first(k)
        assert np.bincount(CLASS[shown], minlength=4).tolist() == [k, k, 0, k]
        assert not np.intersect1d(shown, draw.tested_M).size
    everything = np.sort(np.concatenate([draw.first(5), draw.tested_M]))
    np.testing.assert_array_equal(everything, np.flatnonzero(np.isin(CLASS, [0, 1, 3])))


def test_fewer_shots_are_the_first_of_more_and_a_seed_says_which() -> None:
    draw, again, other = (draw_shots(CLASS, 5, seed) for seed in (3, 3, 4))
    assert set(draw.first(1)) < set(draw.first(3)) < set(draw.first(5))
    np.testing.assert_array_equal(draw.order_CS, again.order_CS)
    assert not np.array_equal(draw.order_CS, other.order_CS)


def test_classes_that_cannot_take_part_leave_an_empty_draw() -> None:
    draw = draw_shots(np.array([0, 0, 1, -1]), 10, seed=0)
    assert draw.order_CS.shape == (0, 10)
    assert len(draw.first(3)) == len(draw.tested_M) == 0
    assert len(taking_part(np.array([-1, -1]), 1)) == 0


def test_a_cell_goes_to_the_nearest_mean_by_cosine() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=(60, 8))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    class_S = np.repeat([4, 7, 9], 5)
    found = nearest_prototype(z[:15], class_S, z[15:])
    expected = []
    for cell in z[15:]:
        cosine = []
        for c in (4, 7, 9):
            mean = np.mean([z[i] for i in range(15) if class_S[i] == c], axis=0)
            cosine.append(cell @ mean / np.linalg.norm(mean))
        expected.append((4, 7, 9)[int(np.argmax(cosine))])
    np.testing.assert_array_equal(found, expected)


def test_the_length_of_a_mean_says_nothing() -> None:
    """Shots that scatter have a short mean; a dot product would prefer the class whose shots agree."""
    scattered = np.array([[0.6, 0.8], [0.6, -0.8]])  # mean (0.6, 0)
    agreeing = np.array([[0.6, 0.8], [0.6, 0.8]])
    cell = np.array([[0.9, np.sqrt(1 - 0.81)]])
    shown = np.concatenate([scattered, agreeing])
    assert (shown.reshape(2, 2, 2).mean(1) @ cell[0]).argmax() == 1  # by dot product the second
    assert nearest_prototype(shown, np.array([0, 0, 1, 1]), cell).tolist() == [0]
