"""Few shots: which cells are shown, and what can be said of the rest without any training.

The shots of a seed are nested and its test cells one set: a class gives `most` cells in a drawn order, k
shots are its first k, and no cell that any number of shots may show is ever tested. So two points of a curve
differ by what was shown and by nothing else, and methods are compared on the same cells.

Prototypes are the simplest use of an embedding (Snell et al. 2017, without the training): the mean of a
class's shots, and a cell is of the class whose mean is nearest by cosine.

Shape suffixes: N cells, S shown cells, M tested cells, C classes, P width of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST_TESTED = 2
"""Cells of a class that must be left to test; a class with fewer takes no part (cells)."""


@dataclass(frozen=True)
class Shots:
    """One draw. order_CS: int64, rows of the cells that each class may show, in the order in which it shows
    them; tested_M: int64, ascending, rows of the cells of these classes that are never shown."""

    order_CS: np.ndarray
    tested_M: np.ndarray

    def first(self, k: int) -> np.ndarray:
        """Rows of the first k cells of every class, class by class (int64 [C * k])."""
        return self.order_CS[:, :k].ravel()


def taking_part(class_N: np.ndarray, most: int) -> np.ndarray:
    """Classes with cells enough for `most` shots and `FEWEST_TESTED` tests (int64, ascending).

    class_N: int64, class of each cell, negative for a cell that has none.
    """
    counts = np.bincount(class_N[class_N >= 0])
    return np.flatnonzero(counts >= most + FEWEST_TESTED)


def draw_shots(class_N: np.ndarray, most: int, seed: int) -> Shots:
    """A seeded draw of `most` cells of each class that takes part; class_N as in `taking_part`."""
    random = np.random.default_rng(seed)
    classes = taking_part(class_N, most)
    rows = [random.permutation(np.flatnonzero(class_N == c)) for c in classes]
    order_CS = np.array([of_class[:most] for of_class in rows], np.int64).reshape(len(classes), most)
    tested = [of_class[most:] for of_class in rows]
    return Shots(order_CS, np.sort(np.concatenate([np.empty(0, np.int64), *tested])))


def nearest_prototype(z_SP: np.ndarray, class_S: np.ndarray, z_MP: np.ndarray) -> np.ndarray:
    """Class of each tested cell (int64 [M]): that of the nearest mean of shown cells, by cosine.

    z_SP, z_MP: embeddings of unit length; class_S: int64. Of equally near classes the first.
    """
    classes = np.unique(class_S)
    mean_CP = np.stack([z_SP[class_S == c].mean(0) for c in classes])
    mean_CP /= np.maximum(np.linalg.norm(mean_CP, axis=1, keepdims=True), 1e-12)
    return classes[(z_MP @ mean_CP.T).argmax(1)]
