"""The pictures of a report: each function returns a matplotlib Figure, drawn without a display.

Colours are Paul Tol's "muted" scheme for cell types (nine hues told apart under every common colour
blindness; beyond nine the marker changes) and Okabe and Ito's blue, orange and vermillion for
methods; nothing is told by colour alone.

Shape suffixes: N cells, K texts, P width of the joint space.
"""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from langcell.inference.tables import MEASURES, Table

HUES = ["#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"]
MARKERS = "osD^vP"
METHOD_COLOURS = {"ct": "#0072B2", "two_step": "#E69F00"}
BASELINE_COLOUR = "#D55E00"
INK, GREY, LIGHT, GRID = "#222222", "#767676", "#9a9a9a", "#e3e3e3"
HALO: dict[str, Any] = {"path_effects": [withStroke(linewidth=3.5, foreground="white")], "zorder": 5}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}
LOSSES = {
    "mgm": "MGM: masked genes",
    "cc": "C-C: cell against cell",
    "ct": "C-T: cell against text",
    "ctm": "CTM: cell-text matching",
}
"""The losses that a run may log, with the titles of their panels."""
RATES = {
    "cells_per_s": "Cells per second",
    "tokens_per_s": "Cell tokens per second",
    "data_wait": "Data wait (share of the step)",
}
MOST_TYPES = 40
"""Rows, and columns, of a confusion matrix that a reader can still tell apart."""
MAP_POINTS = np.array([520, 410])
"""About the size of the map on paper (points), for the places of the stars' numbers."""
FEWEST_CELLS = 12
"""Cells below which a UMAP has no neighbourhoods to show."""


@dataclass(frozen=True)
class JointSpace:
    """Cells and candidate texts in the joint space.

    z_NP, z_KP: embeddings of unit length; cell_type: label of each cell; text: label of each text,
    equal to a cell type's where it names that type; held_out: labels of types kept out of training.
    """

    z_NP: np.ndarray
    cell_type: Sequence[str]
    z_KP: np.ndarray
    text: Sequence[str]
    held_out: frozenset[str] = frozenset()


def losses(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each loss over steps, one panel a loss, stages apart; None if nothing was logged.

    metrics: rows of `metrics.jsonl` (`step`, `stage` and a column a loss; `val_*` where a row has it).
    """
    return _curves(metrics, LOSSES)


def throughput(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Cells and tokens per second and the share of time spent waiting for data, over steps."""
    figure = _curves(metrics, RATES)
    if figure is not None:
        for axes in figure.axes:
            axes.set_ylim(bottom=0)
    return figure


def tables_bar(tables: Mapping[str, Table], measure: str = "balanced_accuracy") -> Figure:
    """The tables side by side: a bar a method; chance, best constant answer and baseline as marks."""
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}, not {measure!r}")
    methods = [method for method in METHOD_COLOURS if any(method in t.predicted for t in tables.values())]
    width = 0.72 / max(len(methods), 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        for x, table in enumerate(tables.values()):
            if table.empty:
                axes.text(x, 0.02, textwrap.fill(f"empty: {table.empty}", 16), ha="center", color=GREY)
                continue
            for i, method in enumerate(m for m in methods if m in table.predicted):
                value = table.measures(method)[measure]
                left = x - 0.36 + i * width
                axes.bar(left, value, width * 0.94, align="edge", color=METHOD_COLOURS[method])
                axes.text(left + width * 0.47, value + 0.012, f"{value:.2f}", ha="center", fontsize=9, **HALO)
            marks: list[tuple[float, Any, str]] = [
                (table.constant[measure], "-", INK),
                (table.chance, ":", LIGHT),
            ]
            if table.baseline is not None:
                marks.append((table.baseline[measure], (0, (5, 2)), BASELINE_COLOUR))
            for value, style, colour in marks:
                axes.plot([x - 0.42, x + 0.42], [value] * 2, linestyle=style, color=colour, linewidth=1.8)
        axes.set_xticks(
            range(len(tables)),
            [f"{name.replace('_', ' ')}\n{_counts(table)}" for name, table in tables.items()],
        )
        axes.set_xlim(-0.6, len(tables) - 0.4)
        axes.set_ylim(0, 1.08)
        axes.set_ylabel(measure.replace("_", " "))
        axes.grid(False, axis="x")
        handles = [
            Line2D([], [], marker="s", linestyle="", markersize=9, color=METHOD_COLOURS[m], label=m)
            for m in methods
        ]
        handles += [
            Line2D([], [], color=INK, linewidth=1.8, label="best constant answer"),
            Line2D([], [], color=LIGHT, linewidth=1.8, linestyle=":", label="chance"),
        ]
        if any(table.baseline for table in tables.values()):
            handles.append(
                Line2D(
                    [], [], color=BASELINE_COLOUR, linewidth=1.8, dashes=(3, 1.5), label="logistic regression"
                )
            )
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def confusion(table: Table, method: str) -> Figure | None:
    """Own types of the cells (rows) against the answers (columns); None for an empty table.

    Colour is the share of the row, the number the count of cells. Of more than `MOST_TYPES` types
    those with the most cells are shown, of as many candidates those answered most often.
    """
    if table.empty:
        return None
    types, counts = table.confusion(method)
    rows = np.sort(np.argsort(-counts.sum(1), kind="stable")[:MOST_TYPES])
    columns = np.sort(np.argsort(-counts.sum(0), kind="stable")[:MOST_TYPES])
    share = (counts / counts.sum(1, keepdims=True))[np.ix_(rows, columns)]
    shown = counts[np.ix_(rows, columns)]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = (3.6 + 0.55 * len(columns), 2.6 + 0.48 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), count in np.ndenumerate(shown):
            if count:
                colour = "white" if share[i, j] > 0.55 else INK
                axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=colour)
        wrapped = [textwrap.fill(table.labels[table.candidates[j]], 26) for j in columns]
        axes.set_xticks(range(len(columns)), wrapped, rotation=55, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), [textwrap.fill(table.labels[types[i]], 30) for i in rows])
        axes.tick_params(length=0, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("answer")
        axes.set_ylabel("cell type")
        cut = len(rows) < counts.shape[0] or len(columns) < counts.shape[1]
        axes.set_title(f"{table.name.replace('_', ' ')}, {method}" + f" (largest {MOST_TYPES} only)" * cut)
    return figure


def joint_space(space: JointSpace, seed: int = 0) -> Figure | None:
    """UMAP of the joint space: cells as points by type, texts as numbered stars.

    The map is fitted on the cells (cosine distance) and the texts are put into it afterwards: a star
    stands among the cells that its text is nearest to, which is what zero-shot annotation asks.
    None with fewer than `FEWEST_CELLS` cells.
    """
    if len(space.z_NP) < FEWEST_CELLS:
        return None
    cells_N2, texts_K2 = _umap(space, seed)
    types = [name for name, _ in Counter(space.cell_type).most_common()]
    looks = {t: (HUES[i % len(HUES)], MARKERS[i // len(HUES) % len(MARKERS)]) for i, t in enumerate(types)}
    own = np.array(space.cell_type, dtype=object)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots()
        size = float(np.clip(9000 / len(own), 3, 26))
        for name in types:
            colour, marker = looks[name]
            at = cells_N2[own == name]
            axes.scatter(at[:, 0], at[:, 1], s=size, c=colour, marker=marker, alpha=0.75, linewidths=0)
        for name, (x, y) in zip(space.text, texts_K2, strict=True):
            colour = looks[name][0] if name in looks else "white"
            axes.scatter(x, y, s=330, marker="*", c=colour, edgecolors=INK, linewidths=0.9, zorder=3)
        _number(axes, texts_K2)
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        _key(figure, space, types, looks)
    return figure


def _umap(space: JointSpace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from umap import UMAP  # compiles on import: two seconds that only this figure needs

    reducer = UMAP(
        n_neighbors=min(15, len(space.z_NP) - 1), min_dist=0.3, metric="cosine", random_state=seed, n_jobs=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells_N2 = reducer.fit_transform(space.z_NP)
        texts_K2 = reducer.transform(space.z_KP) if len(space.z_KP) else np.empty((0, 2))
    return cells_N2, texts_K2


def _number(axes: Axes, stars_K2: np.ndarray) -> None:
    """Write 1, 2, ... beside the stars, each in the freest of the places around its own."""
    low, high = np.array(axes.dataLim.min), np.array(axes.dataLim.max)
    points_K2 = (stars_K2 - low) / np.maximum(high - low, 1e-9) * MAP_POINTS
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False) + np.pi / 4
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    offsets = np.concatenate([around * 14, around * 26, around * 40])  # near places first
    taken = list(points_K2)
    for number, (star, point) in enumerate(zip(stars_K2, points_K2, strict=True), start=1):
        room = [min(np.linalg.norm(point + offset - other) for other in taken) for offset in offsets]
        offset = offsets[np.argmax(np.minimum(room, 13))]
        taken.append(point + offset)
        axes.annotate(
            str(number),
            star,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 3, "shrinkB": 8},
            **HALO,
        )


def _key(
    figure: Figure, space: JointSpace, types: Sequence[str], looks: Mapping[str, tuple[str, str]]
) -> None:
    """The legend: cell types and texts by the number of the text, then types without one."""
    number = {name: i for i, name in enumerate(space.text, start=1)}
    handles = []
    for name in sorted({*types, *space.text}, key=lambda name: (number.get(name, len(number) + 1), name)):
        label = f"{number[name]}  {name}" if name in number else name
        label += " (held out)" * (name in space.held_out)
        colour, marker = looks.get(name, ("white", "*"))
        edge = INK if name not in looks else "none"
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=marker,
                color=colour,
                markeredgecolor=edge,
                markersize=11 if name not in looks else 7,
                label=textwrap.fill(label, 44, subsequent_indent="     "),
            )
        )
    figure.legend(
        handles=handles[: 2 * MOST_TYPES], loc="outside right upper", fontsize=8.5, labelspacing=0.75
    )


def _curves(metrics: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Figure | None:
    """One panel for each of the columns that has numbers, over `step`; a rule where the stage changes."""
    frame = pd.DataFrame(list(metrics)).reindex(
        columns=["step", "stage", *columns, *map("val_{}".format, columns)]
    )
    frame = frame.apply(pd.to_numeric, errors="coerce").sort_values("step", kind="stable")
    present = [name for name in columns if frame[name].notna().any()]
    if not present:
        return None
    changes = frame.loc[frame["stage"].ffill().diff() > 0, "step"]
    wide = min(len(present), 2) if len(present) != 3 else 3
    tall = -(-len(present) // wide)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.7 * wide if wide < 3 else 11, 2.9 * tall), layout="constrained")
        grid = figure.subplots(tall, wide, squeeze=False)
        for axes, name in zip(grid.flat, present, strict=True):
            values = frame[["step", name]].dropna()
            smooth = values[name].rolling(max(1, len(values) // 25), min_periods=1, center=True).median()
            axes.plot(values["step"], values[name], color="#0072B2", alpha=0.25, linewidth=0.9)
            axes.plot(values["step"], smooth, color="#0072B2", linewidth=1.8)
            judged = frame[["step", f"val_{name}"]].dropna()
            if len(judged):
                axes.plot(*judged.to_numpy().T, "o-", color=BASELINE_COLOUR, markersize=4, label="validation")
                if axes is grid[0, 0]:
                    axes.legend(loc="upper right")
            for step in changes[changes > values["step"].min()]:
                axes.axvline(step, color=GREY, linestyle="--", linewidth=1)
                axes.annotate(
                    "stage 2",
                    (step, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(4, -11),
                    textcoords="offset points",
                    fontsize=8,
                    color=GREY,
                )
            axes.set_title(columns[name])
            axes.set_xlabel("step")
            axes.margins(x=0.02)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _counts(table: Table) -> str:
    return f"{len(table.rows):,} cells\n{len(table.candidates)} candidates"
