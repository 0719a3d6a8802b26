"""Averages over seeds are what the runs' summaries say."""

from __future__ import annotations

from langcell.inference.tables import TABLES
from langcell.recipes.seeds import average, markdown


def _summary(accuracy: float) -> dict[str, object]:
    figures = {"accuracy": accuracy, "balanced_accuracy": accuracy / 2, "n": 7, "chance": 0.1}
    constant = {"accuracy": 0.4, "balanced_accuracy": 0.5}
    table = {method: {**figures, "constant": constant} for method in ("ct", "two_step")}
    found = dict.fromkeys(TABLES, table)
    return {"zero_shot": {**found, "unseen": {"empty": "no cell to score"}}}


def test_the_mean_stands_beside_every_seed() -> None:
    result = average({0: _summary(0.6), 1: _summary(0.9)})  # type: ignore[dict-item]
    assert result["seeds"] == [0, 1]
    assert result["zero_shot"]["seen"]["ct"]["accuracy"] == {"mean": 0.75, "by_seed": [0.6, 0.9]}
    assert "unseen" not in result["zero_shot"]
    assert "| `seen` | 7 | **0.38** (0.30, 0.45) | 0.75 |" in markdown(result)
