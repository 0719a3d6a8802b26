"""Few shots and all of them: every method learns from the same cells and is asked about the same cells.

A method is a function, so this module knows none of them. Each point of a curve is a mean over seeds, which
draw the shots and start the training; with ten cells shown the luck of the draw is as large as the
differences between methods, so each seed's figure is kept.

Shape suffixes: N cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from langcell.inference.prototypes import draw_shots
from langcell.inference.tables import MEASURES, measures
from langcell.recipes.labels import Split

Predict = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(rows shown, rows asked, seed) -> class of each row asked, int64."""


def few_shot(
    class_N: np.ndarray,
    methods: Mapping[str, Predict],
    shots: Sequence[int],
    seeds: Sequence[int],
    zero_shot: Mapping[str, np.ndarray],
    told: Callable[[str], object],
) -> dict[str, Any]:
    """Measures of each method at each number of shots, and of zero-shot answers on the same cells.

    class_N: int64, negative for a cell that takes no part; zero_shot: answers int64 [N] by name; told: gets a
    line a point. A result whose `empty` says why where fewer than two classes have cells enough.
    """
    draws = {seed: draw_shots(class_N, max(shots), seed) for seed in seeds}
    first = draws[seeds[0]]
    if len(first.order_CS) < 2:
        return {"empty": f"fewer than two classes have cells enough for {max(shots)} shots and a test"}
    truth = {seed: class_N[draw.tested_M] for seed, draw in draws.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, predict in methods.items():
        found[name] = {}
        for k in shots:
            scores = [
                measures(truth[seed], predict(draw.first(k), draw.tested_M, seed))
                for seed, draw in draws.items()
            ]
            found[name][str(k)] = spread(scores)
            told(f"  {name}, {k} shots: {found[name][str(k)]['balanced_accuracy']['mean']:.3f}")
    most = {seed: np.full(len(t), np.bincount(t).argmax()) for seed, t in truth.items()}
    return {
        "shots": list(shots),
        "seeds": list(seeds),
        "classes": np.unique(truth[seeds[0]]).tolist(),
        "n": len(first.tested_M),
        "chance": 1 / len(first.order_CS),
        "constant": spread([measures(truth[seed], most[seed]) for seed in seeds]),
        "zero_shot": {
            name: spread([measures(truth[seed], answer_N[draw.tested_M]) for seed, draw in draws.items()])
            for name, answer_N in zero_shot.items()
        },
        "methods": found,
    }


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each measure's mean over the seeds, and its values by seed."""
    return {
        name: {"mean": float(np.mean([s[name] for s in scores])), "by_seed": [s[name] for s in scores]}
        for name in MEASURES
    }


def all_data(
    class_N: np.ndarray, split: Split, methods: Mapping[str, Predict], seeds: Sequence[int]
) -> dict[str, Any]:
    """Measures of each method after all training cells, beside the best constant answer, and the split."""
    train, test = split.train, split.test
    truth = class_N[test]
    constant = np.full(len(test), np.bincount(class_N[train]).argmax())
    return {
        "split": {
            "rule": split.rule,
            "train": len(train),
            "test": len(test),
            "left_out": {why: n for why, n in split.left_out.items() if n},
        },
        "seeds": list(seeds),
        "n": len(test),
        "classes": len(np.unique(class_N[train])),
        "constant": measures(truth, constant),
        "methods": {
            name: spread([measures(truth, predict(train, test, seed)) for seed in seeds])
            for name, predict in methods.items()
        },
    }
