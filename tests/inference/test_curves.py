"""The few-shot figure shows the figures it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from langcell.inference.curves import few_shot_curves


def _point(*values: float) -> dict[str, Any]:
    return {"balanced_accuracy": {"mean": float(np.mean(values)), "by_seed": list(values)}}


def test_every_method_is_a_line_with_the_band_of_its_seeds() -> None:
    result = {
        "shots": [1, 5],
        "seeds": [0, 1],
        "classes": ["a", "b"],
        "n": 30,
        "chance": 0.5,
        "zero_shot": {"ct": _point(0.6, 0.7)},
        "methods": {
            "langcell_ce": {"1": _point(0.5, 0.7), "5": _point(0.8, 0.9)},
            "mine": {"1": _point(0.4, 0.4), "5": _point(0.5, 0.5)},
        },
    }
    axes = few_shot_curves(result).axes[0]
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert drawn["LangCell-CE"].get_xdata().tolist() == [1, 5]
    np.testing.assert_allclose(drawn["LangCell-CE"].get_ydata(), [0.6, 0.85])
    np.testing.assert_allclose(drawn["mine"].get_ydata(), [0.4, 0.5])
    np.testing.assert_allclose(drawn["zero-shot, ct"].get_ydata(), [0.65, 0.65])
    np.testing.assert_allclose(drawn["chance"].get_ydata(), [0.5, 0.5])
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.5), (1.0, 0.7), (5.0, 0.8), (5.0, 0.9)} <= {tuple(np.round(v, 6)) for v in band}
    assert axes.get_title(loc="left") == "2 types, 30 test cells, 2 seeds"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5"]
