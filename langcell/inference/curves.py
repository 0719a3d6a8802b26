"""The few-shot figure: what methods make of so many labelled cells, and what zero-shot has without any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from langcell.inference.figures import BASELINE_COLOUR, INK, LIGHT, METHOD_COLOURS, STYLE

LINES = {
    "langcell": ("LangCell (both encoders)", METHOD_COLOURS["two_step"], "s"),
    "langcell_ce": ("LangCell-CE", METHOD_COLOURS["ct"], "o"),
    "geneformer": ("Geneformer, same head", "#CC79A7", "^"),
    "random_init": ("random init, same head", "#767676", "v"),
    "logistic_regression": ("logistic regression on counts", BASELINE_COLOUR, "D"),
    "prototypes": ("prototypes, no training", "#009E73", "P"),
}
"""Label, colour (Okabe and Ito) and marker of each method."""


def few_shot_curves(result: Mapping[str, Any], measure: str = "balanced_accuracy") -> Figure:
    """Each method over the number of shots: mean over the seeds, and a band from the least to the greatest.

    result: of `recipes.benchmarks.few_shot.few_shot`, with its `zero_shot` answers (horizontal lines),
    `chance` and `n`.
    """
    shots = result["shots"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, points in result["methods"].items():
            label, colour, marker = LINES.get(name, (name, INK, "."))
            values = [points[str(k)][measure] for k in shots]
            low, high = ([end(value["by_seed"]) for value in values] for end in (min, max))
            axes.fill_between(shots, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(
                shots,
                [value["mean"] for value in values],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.8,
                label=label,
            )
        for name, value in result["zero_shot"].items():
            axes.axhline(
                value[measure]["mean"],
                color=METHOD_COLOURS.get(name, INK),
                linestyle=(0, (5, 2)),
                linewidth=1.6,
                label=f"zero-shot, {name}",
            )
        axes.axhline(result["chance"], color=LIGHT, linestyle=":", linewidth=1.8, label="chance")
        axes.set_xscale("log")
        axes.set_xticks(shots, [str(k) for k in shots])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("labelled cells of each type")
        axes.set_ylabel(measure.replace("_", " "))
        axes.set_title(
            f"{len(result['classes'])} types, {result['n']:,} test cells, {len(result['seeds'])} seeds"
        )
        figure.legend(loc="outside right center")
    return figure
