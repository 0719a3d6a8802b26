"""The report of a run: one HTML file that opens anywhere, and its pictures as PNG files beside it.

Pictures are embedded, styles are inline and nothing is loaded from the network, so that the file
can be mailed or put away with the run. Every value is escaped. Files appear whole or not at all,
`index.html` last.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from langcell.files import write_whole
from langcell.inference import figures
from langcell.inference.figures import JointSpace
from langcell.inference.tables import Table

MEANING = {
    "seen": "Test cells of types that were trained on, with every type of the corpus as a candidate: "
    "how well the model annotates what it knows, beside logistic regression on the same cells.",
    "unseen": "Cells of types that were held out of training, with the held-out types as candidates: "
    "whether descriptions that it never read tell new types apart.",
    "new_words": "Cells of held-out types, with coarser ontology terms that no training text used as "
    "candidates: new cell types described in new words.",
    "new_words_seen": "Test cells of types that were trained on, with the same coarser terms: known "
    "cell types described in new words.",
    "generalised": "Cells of held-out types, with every type of the corpus as a candidate: whether a "
    "cell finds its new type among the ones that the model was trained on.",
}
"""What each table measures."""
GENERALISED = (
    "Expect this one to be near zero after training on few types, whatever the method. Training draws "
    "each cell to one of the texts it reads, so a cell of a held-out type lies nearer to its relative "
    "among them than to a text that drew no cell. This is the known bias of generalised zero-shot "
    "learning, not a fault of the run; it shrinks with the number of training types, and nothing is "
    "tuned on it."
)
DPI = 150
CSS_PIXELS = 90
"""Pixels of a page that an inch of a picture takes."""


def write_report(
    directory: Path,
    *,
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Table],
    joint_space: JointSpace | None,
    config_yaml: str,
    versions: Mapping[str, str],
    manifest: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> Path:
    """Write `index.html` and its PNG files into `directory` (made if absent); returns the HTML's path.

    metrics: rows of metrics.jsonl; tables: by name, empty ones included; joint_space: cells and texts
    to be mapped, or None; config_yaml: the resolved configuration; versions: package to version;
    manifest: the corpus's; summary: headline figures (the scalars are shown on top).
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(metrics, tables, joint_space)
    encoded = {}
    for name, figure in pictures.items():
        image = png(figure)
        write_whole(directory / f"{name}.png", image)
        encoded[name] = {
            "png": base64.b64encode(image).decode(),
            "width": round(figure.get_figwidth() * CSS_PIXELS),
        }
    environment = Environment(
        loader=PackageLoader("langcell.recipes", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        figures=encoded,
        tables=[_row(table) for table in tables.values()],
        generalised=GENERALISED,
        headline={name: _number(value) for name, value in summary.items() if _is_scalar(value)},
        config=config_yaml,
        versions=versions,
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False, default=str),
        summary=json.dumps(summary, indent=2, ensure_ascii=False, default=str),
    )
    index = directory / "index.html"
    write_whole(index, page.encode())
    return index


def _pictures(
    metrics: Sequence[Mapping[str, Any]], tables: Mapping[str, Table], joint_space: JointSpace | None
) -> dict[str, Figure]:
    made: dict[str, Figure | None] = {
        "losses": figures.losses(metrics),
        "throughput": figures.throughput(metrics),
        "tables": figures.tables_bar(tables) if tables else None,
        "joint_space": figures.joint_space(joint_space) if joint_space is not None else None,
    }
    for name, table in tables.items():
        made[f"confusion_{name}"] = figures.confusion(table, "ct")
    return {name: figure for name, figure in made.items() if figure is not None}


def _row(table: Table) -> dict[str, Any]:
    """What the template shows of a table."""
    answers: list[tuple[str, dict[str, float]]] = []
    if not table.empty:
        answers = [(method, table.measures(method)) for method in table.predicted]
        if table.baseline is not None:
            answers.append(("logistic regression", table.baseline))
        answers.append(("best constant answer", table.constant))
    return {
        "name": table.name,
        "title": table.name.replace("_", " "),
        "meaning": MEANING[table.name],
        "empty": table.empty,
        "n": len(table.rows),
        "types": len(set(table.types)),
        "candidates": [(term, table.labels[term]) for term in table.candidates],
        "chance": None if table.empty else table.chance,
        "answers": answers,
        "unscored": table.unscored,
    }


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
