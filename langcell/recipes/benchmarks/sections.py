"""Results as tables that a person reads: a section a part, the same in the terminal and in tables.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langcell.inference.tables import MEASURES, METHODS

RANDOM = (
    "\n`random_init` is fine-tuned like the others, at a rate made for trained weights: it shows what the "
    "start is worth, not what an encoder from scratch can learn."
)
PATHWAY_MEASURES = ("auroc", "average_precision", "macro_f1")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers that are no counts with three decimals, None as a dash."""
    lines = [header, ["---"] * len(header), *([_text(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def zero_shot(result: Mapping[str, Any]) -> str:
    """A row a facet and method; below, what has no term."""
    rows, notes = [], []
    for facet, found in result.items():
        if "empty" in found:
            notes.append(f"`{facet}`: {found['empty']}.")
        else:
            rows += [
                [
                    facet,
                    method,
                    *_measured(found[method]),
                    found[method]["chance"],
                    found[method]["constant"]["balanced_accuracy"],
                    found[method]["n"],
                ]
                for method in METHODS
            ]
        if not found["in_training_texts"]:
            notes.append(f"`{facet}`: no training text of this model speaks of it.")
        if found["unscored"]:
            cells = sum(found["unscored"].values())
            most = "; ".join(f"{what} ({n})" for what, n in list(found["unscored"].items())[:5])
            notes.append(f"`{facet}`: {cells} cells have no term and are left out: {most}.")
    header = ["facet", "method", *map(_words, MEASURES), "chance", "best constant (balanced)", "cells"]
    return "\n".join([table(header, rows)] * bool(rows) + [""] * bool(notes) + notes)


def few_shot(result: Mapping[str, Any]) -> str:
    """Balanced accuracy by method and number of shots, mean (least to greatest of the seeds)."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    shots = [str(k) for k in result["shots"]]
    rows = [
        [name, *(_range(points[k]["balanced_accuracy"]) for k in shots)]
        for name, points in result["methods"].items()
    ]
    rows += [
        [f"zero-shot, {name}", *[_range(value["balanced_accuracy"])] * len(shots)]
        for name, value in result["zero_shot"].items()
    ]
    rows += [["chance", *[result["chance"]] * len(shots)]]
    return (
        table(["balanced accuracy", *(f"{k} shots" for k in shots)], rows)
        + f"\n\n{len(result['classes'])} types, {result['n']} test cells, {len(result['seeds'])} seeds: mean "
        "(least to greatest). The cells shown at k shots are among those at more; none is ever tested."
        + _types_left_out(result["types_left_out"])
        + RANDOM * ("random_init" in result["methods"])
    )


def finetuning(result: Mapping[str, Any]) -> str:
    """Measures by method, and the split."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    rows = [
        [name, *(_range(scores[measure]) for measure in MEASURES)]
        for name, scores in result["methods"].items()
    ]
    rows += [["best constant of training", *_measured(result["constant"])]]
    split = result["split"]
    return (
        table(["method", *map(_words, MEASURES)], rows)
        + f"\n\nSplit: {split['rule']}; {split['train']} cells to learn from, {split['test']} to test, "
        f"{result['classes']} types, {len(result['seeds'])} seeds: mean (least to greatest)."
        + "".join(f" Left out: {n} ({why})." for why, n in split["left_out"].items())
        + RANDOM * ("random_init" in result["methods"])
    )


def retrieval(result: Mapping[str, Any]) -> str:
    """R@k of both directions beside chance."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    rows = [
        [direction.replace("_", " "), k, value["value"], value.get("balanced"), value["chance"]]
        for direction, found in result.items()
        for k, value in found.items()
        if k.startswith("R@")
    ]
    sizes = result["cell_to_text"]
    return (
        table(["direction", "measure", "value", "mean over types", "chance"], rows)
        + f"\n\n{sizes['queries']} cells, {sizes['answers']} texts. R@k: a right answer is among the first k."
    )


def integration(result: Mapping[str, Any]) -> str:
    """A row a measure, a column a space."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    spaces = result["spaces"]
    first = next(iter(spaces.values()))
    rows = [[measure, *(found[measure] for found in spaces.values())] for measure in first]
    return table(["measure", *spaces], rows) + (
        f"\n\n{result['n']} cells, {result['batches']} batches."
        + f" Left out, without a batch: {result['without_batch']}." * (result["without_batch"] > 0)
    )


def clustering(result: Mapping[str, Any]) -> str:
    """ARI and NMI by space."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    rows = [[name, _range(found["ari"]), _range(found["nmi"])] for name, found in result["spaces"].items()]
    return (
        table(["space", "ARI", "NMI"], rows)
        + f"\n\nk-means, {result['clusters']} clusters as there are types, {result['n']} cells: mean over "
        "seeds (least to greatest)."
    )


def pathways(result: Mapping[str, Any]) -> str:
    """A row a method."""
    if "empty" in result:
        return f"Nothing to measure: {result['empty']}."
    rows = [[name, *(scores[m] for m in PATHWAY_MEASURES)] for name, scores in result["methods"].items()]
    return (
        table(["method", "macro AUROC", "macro average precision", "macro F1"], rows)
        + f"\n\n{result['pathways']} pathways, {result['n']} test cells ({result['rule']}). {result['label']}"
    )


def _types_left_out(left_out: Mapping[str, int]) -> str:
    if not left_out:
        return ""
    return f"\nToo few cells, left out: {', '.join(f'{name} ({n})' for name, n in left_out.items())}."


def _measured(scores: Mapping[str, float]) -> list[float]:
    return [scores[measure] for measure in MEASURES]


def _range(value: Mapping[str, Any]) -> str:
    low, high = min(value["by_seed"]), max(value["by_seed"])
    return f"{value['mean']:.2f}" if low == high else f"{value['mean']:.2f} ({low:.2f}-{high:.2f})"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
