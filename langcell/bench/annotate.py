"""The benchmark of zero-shot annotation: ours beside the algorithm of LangCell's notebook
(`bench.official`).

The same cells, with a Census's lengths, the same candidates and the same weights (6 layers of 256,
MiniLM-size text, random), by turns in processes of their own. Headline row `top_k`: cells per second where
only the candidates that contrast prefers are matched, over the notebook's, which matches all. `details` hold
the rates at every k and with all candidates matched (what is gained without pruning), each saving alone, and
the peak memory.

A shortcut counts only if its answers do: with all candidates matched ours must give every cell the notebook's
answer, and every score to 1e-4, or the benchmark ends without a figure. What pruning changes is measured on a
trained model (`model`) and real cells, among the demo's ten types and among as many candidates as the rates:
the share of cells that keep the answer which they have with all candidates matched.

Shape suffixes: N cells, C candidates.
"""

from __future__ import annotations

import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from langcell.bench import annotate_work, records
from langcell.bench.annotate_work import MODEL, AnnotateTask, Done, generated_cells
from langcell.bench.figures import Figures, headline, row
from langcell.bench.options import AnnotateOptions
from langcell.bench.turns import Kept
from langcell.census.demo import DEMO_TYPES
from langcell.census.synthetic import LAW
from langcell.errors import InputError
from langcell.inference.embed import tokenize
from langcell.model.interop import load_tokenizer
from langcell.text.describe import candidate
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

LEUKOCYTE = "CL:0000738"
TOLERANCE = 1e-4
DEMO_CELLS = 700


def run(options: AnnotateOptions) -> Figures:
    """Measure, print a table, write summary.json in `options.dir`; what stands there.

    Raises InputError for options that cannot be, RuntimeError where ours is not the notebook's answer.
    """
    texts = _check(options)
    directory = Path(os.path.abspath(options.dir))
    directory.mkdir(parents=True, exist_ok=True)
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    task = AnnotateTask(options.cells, options.max_length, options.seed)
    agreement = _agreement(options, task, texts, cpus) if options.model is not None else "not measured"
    found = _rates(options, task, texts, cpus)
    headline_k = str(options.top_k[0])
    summary = {
        "top_k": row(found["ours"][headline_k], found["baseline"], "cells_per_s", "cells/s"),
        "details": {
            **found,
            "lengths": _lengths(task, texts),
            "agreement": agreement,
            "candidates": len(texts),
            "cpus": cpus,
            "load_average_before": load,
        },
    }
    records.publish("annotate", options, summary, table(summary))
    return summary


def _rates(options: AnnotateOptions, task: AnnotateTask, texts: list[str], cpus: int) -> Figures:
    """Rates of ours at every k, of the notebook's algorithm, and of that with each saving alone."""
    first, every = options.top_k[0], len(texts)
    done: dict[str, list[Done]] = {"ours": [], "baseline": []}
    with ExitStack() as stack:
        own = stack.enter_context(Kept(annotate_work.ours, task, cpus=cpus))
        other = stack.enter_context(Kept(annotate_work.notebook, task, cpus=cpus))
        own.wait()
        other.wait()
        for _ in range(options.repeats):
            turn, own_mb = own.turn(texts, first)
            done["ours"].append(_noted(f"ours, {first} matched", turn))
            turn, other_mb = other.turn(texts)
            done["baseline"].append(_noted("notebook", turn))
        of_ours = {str(first): _figures(done["ours"], first, own_mb)}
        for k in [*options.top_k[1:], every]:
            turn, peak_mb = own.turn(texts, k)
            of_ours[str(k)] = _figures([_noted(f"ours, {k} matched", turn)], k, peak_mb)
        theirs_NC = done["baseline"][0].scores_NC
        equal = compare(turn.scores_NC, theirs_NC)
        alone = {}
        for saving in ("packing", "keys"):
            turn, peak_mb = other.turn(texts, saving)
            alone[saving] = _figures([_noted(f"notebook, {saving} alone", turn)], every, peak_mb)
            compare(turn.scores_NC, theirs_NC)
    baseline = _figures(done["baseline"], every, other_mb)
    return {"ours": of_ours, "baseline": baseline, "alone": alone, "equal": equal}


def _agreement(options: AnnotateOptions, task: AnnotateTask, texts: list[str], cpus: int) -> Figures:
    """Of a trained model: the share of cells whose answer stays, by number of candidates and by k.

    The notebook's algorithm is given as many of the cells as for the rates.
    """
    ontology = Ontology.packaged()
    types = [candidate(term) for term in map(ontology.get, sorted(DEMO_TYPES.values())) if term is not None]
    many = types + [text for text in texts if text not in types][: max(0, len(texts) - len(types))]
    task = replace(task, cells=options.trained_cells, export=options.model)
    few = replace(task, cells=min(options.cells, options.trained_cells))
    found: Figures = {}
    with ExitStack() as stack:
        own = stack.enter_context(Kept(annotate_work.ours, task, cpus=cpus))
        other = stack.enter_context(Kept(annotate_work.notebook, few, cpus=cpus))
        for n, among in {len(among): among for among in (types, many)}.items():
            matched: Done = _noted(f"trained, {n} candidates", own.turn(among, n)[0])
            equal = compare(matched.scores_NC[: few.cells], other.turn(among)[0].scores_NC)
            answer_N = matched.scores_NC.argmax(axis=1)
            stays = {
                str(k): float((own.turn(among, k)[0].scores_NC.argmax(axis=1) == answer_N).mean())
                for k in options.top_k
            }
            found[str(n)] = {"cells": task.cells, "stays": stays, "equal": equal}
    return found


def candidate_texts(count: int, seed: int) -> list[str]:
    """Texts of so many defined cell types below `leukocyte`, a seeded choice. Raises InputError."""
    ontology = Ontology.packaged()
    terms = [ontology.get(term) for term in sorted(ontology.live("CL"))]
    texts = [candidate(t) for t in terms if t is not None and t.definition and LEUKOCYTE in t.ancestors]
    if count > len(texts):
        raise InputError(f"--candidates is {count}; there are {len(texts)} defined types of leukocyte.")
    chosen = np.random.default_rng(seed).choice(len(texts), count, replace=False)
    return [texts[i] for i in chosen]


def compare(ours_NC: np.ndarray, theirs_NC: np.ndarray) -> Figures:
    """How far the scores of ours, with all candidates matched, are from the notebook's.

    least_margin: by how much the notebook's answer leads the next one, at least. Raises RuntimeError where an
    answer is another or a score is off by more than 1e-4.
    """
    same = float((ours_NC.argmax(axis=1) == theirs_NC.argmax(axis=1)).mean())
    off = float(np.abs(ours_NC - theirs_NC).max())
    best_N2 = np.sort(theirs_NC, axis=1)[:, -2:]
    found = {
        "cells": len(theirs_NC),
        "same_answers": same,
        "score_difference": off,
        "least_margin": float(np.diff(best_N2, axis=1).min()),
    }
    if not (same == 1.0 and off <= TOLERANCE):  # what is no number is not equal
        raise RuntimeError(f"ours is not the answer of the notebook's algorithm: {found}")
    return found


def table(summary: Figures) -> str:
    """The headline row, every way to annotate, and the agreement, to read."""
    details = summary["details"]
    lengths, equal = details["lengths"], details["equal"]
    lines = headline(summary)
    lines.append(f"\n{'':28}{'cells/s':>10}{'pairs/s':>10}{'faster':>8}{'cpu-s/cell':>12}{'peak MB':>9}")
    ways = {
        **{f"ours, {k} matched": each for k, each in details["ours"].items()},
        "notebook": details["baseline"],
        **{f"notebook, {saving} alone": each for saving, each in details["alone"].items()},
    }
    for name, each in ways.items():
        faster = each["cells_per_s"] / details["baseline"]["cells_per_s"]
        lines.append(
            f"{name:28}{each['cells_per_s']:10.3f}{each['pairs_per_s']:10.1f}{faster:8.2f}"
            f"{each['cpu_s_per_cell']:12.3f}{each['peak_mb']:9,.0f}"
        )
    lines.append(
        f"\n{lengths['cells']} cells of {lengths['mean']:,.0f} tokens (longest {lengths['longest']:,}), "
        f"{details['candidates']} candidates of {lengths['mean_text']:.0f}; all matched: "
        f"{equal['same_answers']:.0%} the same answers, scores within {equal['score_difference']:.1e}"
    )
    if isinstance(details["agreement"], str):
        lines.append("answers that stay when candidates are pruned: not measured (--model EXPORT)")
    else:
        for n, each in details["agreement"].items():
            stays = ", ".join(f"{share:.1%} at k = {k}" for k, share in each["stays"].items())
            lines.append(
                f"answers that stay, trained model, {each['cells']} cells of the demo, "
                f"{n} candidates: {stays}"
            )
    return "\n".join(lines)


def _figures(turns: list[Done], matched: int, peak_mb: float) -> Figures:
    cells, seconds = len(turns[0].scores_NC), [turn.seconds for turn in turns]
    rate = cells / statistics.median(seconds)
    return {
        "cells_per_s": rate,
        "pairs_per_s": rate * matched,
        "cpu_s_per_cell": statistics.median(turn.cpu_s for turn in turns) / cells,
        "seconds": seconds,
        "peak_mb": peak_mb,
    }


def _lengths(task: AnnotateTask, texts: list[str]) -> Figures:
    """Tokens of what the rates are measured on."""
    length_N = generated_cells(task.cells, task.max_length, task.seed)[0].lengths_B
    length_C = tokenize(load_tokenizer(MODEL.text_init), texts, TextOptions().max_length).lengths_B
    return {
        "cells": len(length_N),
        "mean": float(length_N.double().mean()),
        "longest": int(length_N.max()),
        "mean_text": float(length_C.double().mean()),
    }


def _check(options: AnnotateOptions) -> list[str]:
    """The candidates, if the options can be."""
    least = {"cells": 1, "candidates": 2, "max_length": 2, "repeats": 1, "trained_cells": 1}
    most = {"cells": LAW.block, "trained_cells": DEMO_CELLS}
    for name, lowest in least.items():
        value = getattr(options, name)
        if not lowest <= value <= most.get(name, value):
            limit = f" and {most[name]} at most" if name in most else ""
            raise InputError(f"--{name} is {value}; it must be {lowest} at least{limit}.")
    if not options.top_k or not all(1 <= k < options.candidates for k in options.top_k):
        raise InputError(
            f"--top_k is {options.top_k}; each must be 1 at least and less than --candidates, "
            f"{options.candidates}."
        )
    return candidate_texts(options.candidates, options.seed)


def _noted(name: str, done: Done) -> Done:
    print(f"{name:38}{done.seconds:10.2f} s", file=sys.stderr, flush=True)
    return done
