"""How well the plan mixes cells: its batches beside those of a full shuffle, and of none.

A batch of few texts has few negatives to tell a cell from, and one of few studies lets training drift from
study to study. In a Census the cells of a dataset stand together, and in it those of a donor (in a sample of
a release 98.8% of the neighbours within a dataset are of one donor), so a row group is a handful of texts of
one dataset. A round has M x G cells, which are M x G / R row groups of R cells, and each of its global
batches is spread over all of them: it sees no more datasets than its round has, however well the cells
inside are shuffled.

Measured is obs alone, no counts and no tokens: a generated Census (`census.synthetic`, its datasets put in
order of donors) is filtered, split and sliced as `prepare` does it, and one epoch of the real plan is dealt,
every batch of it. Headline rows: the defaults of `corpus`, with the first batch size, ours beside a full
shuffle (ratio 1 is as good). In `details` other row groups and windows, with what they cost to read: a window
reads its row groups whole, however few of their rows are its own.

Shape suffixes: C train cells in the order of blocks, S steps, V lanes, B cells of a micro-batch, N batches
of n cells.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from langcell.bench import records
from langcell.bench.figures import Figures, headline
from langcell.bench.options import ShuffleOptions
from langcell.bench.processes import MB, memory_mb
from langcell.cells.options import TokenOptions
from langcell.census.options import CensusOptions
from langcell.census.slices import make_slices
from langcell.census.synthetic import LAW, draw_obs
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan, RowGroups
from langcell.corpus.schema import TRAIN, block_name
from langcell.corpus.splits import assign_splits
from langcell.corpus.texts import describe_obs
from langcell.errors import InputError
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

TOKEN_BYTES = 2
FACETS = {"type": "cell types", "text": "texts", "dataset": "datasets"}
"""What is counted in a batch."""
UNITS = {"global": "global batch", "micro": "micro-batch"}


@dataclass(frozen=True)
class Cells:
    """The train cells of a corpus in the order of its blocks.

    facets: code of each cell (int64 [C]) by name, of `FACETS`; length_C: tokens (int64); rows: cells of each
    block.
    """

    facets: dict[str, np.ndarray]
    length_C: np.ndarray
    rows: list[int]

    def __len__(self) -> int:
        return len(self.length_C)


def run(options: ShuffleOptions) -> Figures:
    """Measure, print a table, write summary.json in `options.dir`; what stands there.

    Raises InputError for options that cannot be.
    """
    _check(options)
    load = os.getloadavg()[0]
    cells = census_cells(options.cells, options.seed)
    if len(cells) < max(options.global_batch):
        raise InputError(
            f"--cells {options.cells}: {len(cells)} of them are train cells, fewer than one global batch "
            f"({max(options.global_batch)})."
        )
    details: Figures = {"corpus": _corpus(cells, options.cells), "full_shuffle": {}, "no_shuffle": {}}
    details["plans"] = []
    layouts = _layouts(options)
    with tqdm(total=len(options.global_batch) * len(layouts), desc="plans", unit="plan") as shown:
        for sizes in zip(options.global_batch, options.micro_batch, strict=True):
            batch = f"{sizes[0]}/{sizes[1]}"
            plan = Plan(row_groups_of(cells.rows, layouts[0][0]), options.seed, *sizes, layouts[0][1])
            full = mixing(cells, full_shuffle(plan, options.seed))
            details["full_shuffle"][batch] = full
            details["no_shuffle"][batch] = _with_shares(mixing(cells, no_shuffle(plan)), full)
            for row_group_cells, window_steps in layouts:
                plan = Plan(row_groups_of(cells.rows, row_group_cells), options.seed, *sizes, window_steps)
                details["plans"].append(
                    {"batch": batch, "row_group_cells": row_group_cells, "window_steps": window_steps}
                    | _with_shares(mixing(cells, planned(plan, cells.length_C)), full)
                    | {"cost": cost(plan, float(cells.length_C.mean()))}
                )
                shown.update()
    default = details["plans"][0]
    summary = _rows(default, details["full_shuffle"][default["batch"]])
    summary["details"] = details | {"load_average_before": load}
    Path(options.dir).mkdir(parents=True, exist_ok=True)
    records.publish("shuffle", options, summary, _table(summary))
    return summary


def census_cells(cells: int, seed: int) -> Cells:
    """The train cells of a generated Census of so many cells, as `prepare` would take them with its defaults
    (primary data; whole datasets for testing)."""
    obs = _by_donor(draw_obs(cells, seed))
    obs = obs.append_column("nnz", pa.array(_draw_nnz(cells, seed)))
    obs = obs.filter(obs["is_primary_data"])
    text = TextOptions()
    texts, text_C, _ = describe_obs(obs, Ontology.load(text, CensusOptions().organism), text)
    term_C = texts.term_index[text_C]
    terms = pa.DictionaryArray.from_arrays(pa.array(term_C + 1, pa.int32()), ["", *texts.terms])
    split_C = assign_splits(obs.append_column("term", terms), CorpusOptions(), [], [])
    slices = make_slices(obs.select(["soma_joinid", "nnz"]), CensusOptions().slice_nnz)
    slice_C = np.repeat(np.arange(len(slices)), [len(part.cells) for part in slices])
    train = split_C == TRAIN
    rows = np.bincount(slice_C[train], minlength=len(slices))
    nnz_C = obs["nnz"].to_numpy()
    return Cells(
        {"type": term_C[train], "text": text_C[train], "dataset": _codes(obs, "dataset_id")[train]},
        np.minimum(nnz_C + 1, TokenOptions().max_length)[train],
        rows[rows > 0].tolist(),
    )


def row_groups_of(rows: list[int], row_group_cells: int) -> tuple[RowGroups, ...]:
    """Row groups of train blocks that have so many rows each, as their writer cuts them."""
    return tuple(
        RowGroups(
            block_name("train", block),
            tuple(min(row_group_cells, count - start) for start in range(0, count, row_group_cells)),
        )
        for block, count in enumerate(rows)
    )


def planned(plan: Plan, length_C: np.ndarray, epoch: int = 0) -> np.ndarray:
    """The cells of every micro-batch of an epoch, as streams deal them: int64 [S, V, B]."""
    starts = (np.cumsum(plan.rows_R) - plan.rows_R).tolist()
    first = dict(zip(_names(plan), starts, strict=True))
    order_SVB = np.empty((plan.steps, plan.lanes, plan.micro_batch), np.int64)
    for lane in range(plan.lanes):
        for window in plan.windows(epoch, lane):
            cells = np.concatenate(
                [np.arange(span.start, span.stop) + first[span.file, span.index] for span in window.spans]
            )
            dealt = plan.deal(window, length_C[cells])
            order_SVB[window.first_step : window.first_step + window.steps, lane] = cells[dealt]
    return order_SVB


def full_shuffle(plan: Plan, seed: int) -> np.ndarray:
    """A random permutation of all cells, dealt to as many batches: int64 [S, V, B]."""
    return _dealt(plan, np.random.default_rng([seed, 3]).permutation(plan.cells))


def no_shuffle(plan: Plan) -> np.ndarray:
    """The cells as they stand, dealt to as many batches: int64 [S, V, B]."""
    return _dealt(plan, np.arange(plan.cells))


def mixing(cells: Cells, order_SVB: np.ndarray) -> dict[str, dict[str, Figures]]:
    """What the global batches and the micro-batches of an epoch hold, by unit and facet.

    Of each facet `bits` (entropy of its labels in a batch), `distinct` (labels in a batch) and `largest`
    (share of a batch that the most frequent label has, 0 to 1), each the mean over batches and the standard
    deviation (`spread`).
    """
    batches = {
        "global": order_SVB.reshape(len(order_SVB), -1),
        "micro": order_SVB.reshape(-1, order_SVB.shape[-1]),
    }
    return {
        unit: {name: _of_batches(code_C[order_Nn]) for name, code_C in cells.facets.items()}
        for unit, order_Nn in batches.items()
    }


def cost(plan: Plan, tokens_mean: float) -> Figures:
    """What the windows of the first epoch take to read: rows of their row groups for each row of their own
    (`rows_read_per_row`), files opened for a window (one for each row group: neighbours in a file are seldom
    neighbours in the order), and the tokens of a full window in memory (`window_mb`)."""
    rows_of = dict(zip(_names(plan), plan.rows_R.tolist(), strict=True))
    windows = [window for lane in range(plan.lanes) for window in plan.windows(0, lane)]
    spans = [span for window in windows for span in window.spans]
    return {
        "rows_read_per_row": sum(rows_of[span.file, span.index] for span in spans)
        / sum(span.stop - span.start for span in spans),
        "files": len(spans) / len(windows),
        "window_mb": plan.window_steps * plan.micro_batch * tokens_mean * TOKEN_BYTES / MB,
    }


def _names(plan: Plan) -> list[tuple[str, int]]:
    """File and index of every row group, in manifest order."""
    return [(groups.file, index) for groups in plan.row_groups for index, _ in enumerate(groups.rows)]


def _layouts(options: ShuffleOptions) -> list[tuple[int, int]]:
    """Cells of a row group and steps of a window of each plan, the defaults first."""
    default = (CorpusOptions().row_group_cells, CorpusOptions().window_steps)
    others = itertools.product(options.row_group_cells, options.window_steps)
    return [default, *(layout for layout in others if layout != default)]


def _corpus(cells: Cells, drawn: int) -> Figures:
    counted = {
        name: {"count": len(np.unique(code_C)), "bits": _rounded(_counted(code_C[None])[0][0])}
        for name, code_C in cells.facets.items()
    }
    return {
        "cells": drawn,
        "train_cells": len(cells),
        "blocks": len(cells.rows),
        "tokens_mean": float(cells.length_C.mean()),
        **counted,
    }


def _codes(obs: pa.Table, column: str) -> np.ndarray:
    return obs[column].unify_dictionaries().combine_chunks().indices.to_numpy().astype(np.int64)


def _by_donor(obs: pa.Table) -> pa.Table:
    """The cells in order of donors within each dataset, joinids anew; datasets stay where they are."""
    dataset = _codes(obs, "dataset_id")
    place = np.cumsum(np.diff(dataset, prepend=dataset[:1]) != 0)
    order = np.lexsort((_codes(obs, "donor_id"), place))
    joinid = obs.schema.get_field_index("soma_joinid")
    return obs.take(order).set_column(joinid, "soma_joinid", obs["soma_joinid"])


def _draw_nnz(cells: int, seed: int) -> np.ndarray:
    """Non-zeros of cells by the law of their counts, int64: of a cell's total, what is expected of it."""
    share = (np.arange(1, LAW.expressed + 1) + LAW.gene_shift) ** -LAW.gene_exponent
    share /= share.sum()
    totals = np.geomspace(1, 1e6, 100)
    genes = [-np.expm1(-total * share).sum() for total in totals]
    drawn = LAW.total_median * np.exp(np.random.default_rng([seed, 4]).normal(0, LAW.total_spread, cells))
    return np.rint(np.interp(drawn, totals, genes)).astype(np.int64)


def _dealt(plan: Plan, order_C: np.ndarray) -> np.ndarray:
    return order_C[: plan.steps * plan.global_batch].reshape(plan.steps, plan.lanes, plan.micro_batch)


def _counted(code_Nn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each batch: entropy (bits), distinct labels, share of the most frequent one (float64 [N])."""
    n_batches, n = code_Nn.shape
    sorted_Nn = np.sort(code_Nn, axis=1)
    begins_Nn = np.ones((n_batches, n), bool)
    begins_Nn[:, 1:] = sorted_Nn[:, 1:] != sorted_Nn[:, :-1]
    begins = np.flatnonzero(begins_Nn)
    count = np.diff(begins, append=n_batches * n)
    batch = np.searchsorted(begins, np.arange(n_batches) * n)
    bits = np.log2(n) - np.add.reduceat(count * np.log2(count), batch) / n
    return bits, begins_Nn.sum(axis=1).astype(float), np.maximum.reduceat(count, batch) / n


def _of_batches(code_Nn: np.ndarray) -> Figures:
    return {
        name: {"mean": _rounded(values.mean()), "spread": _rounded(values.std())}
        for name, values in zip(("bits", "distinct", "largest"), _counted(code_Nn), strict=True)
    }


def _rounded(figure: np.floating) -> float:
    """Five digits behind the point: a record holds hundreds of figures."""
    return round(float(figure), 5)


def _with_shares(
    found: dict[str, dict[str, Figures]], full: dict[str, dict[str, Figures]]
) -> dict[str, dict[str, Figures]]:
    """Figures of `mixing`, and the `share` of each: its mean over the full shuffle's."""
    return {
        unit: {
            facet: {
                name: each | {"share": _rounded(each["mean"] / full[unit][facet][name]["mean"])}
                for name, each in figures.items()
            }
            for facet, figures in facets.items()
        }
        for unit, facets in found.items()
    }


def _rows(default: Figures, full: dict[str, dict[str, Figures]]) -> Figures:
    peak_mb = memory_mb(os.getpid())["VmHWM"]
    wanted = [("bits", f"bits of {what}", facet) for facet, what in FACETS.items()]
    wanted += [("distinct", FACETS[facet], facet) for facet in ("text", "dataset")]
    return {
        f"{unit}_{facet}_{name}": {
            "ours": (ours := default[unit][facet][name]["mean"]),
            "baseline": (baseline := full[unit][facet][name]["mean"]),
            "ratio": ours / baseline,
            "unit": f"{what}, {batch} of {default['batch'].split('/')[unit == 'micro']}",
            "peak_mb": peak_mb,
        }
        for unit, batch in UNITS.items()
        for name, what, facet in wanted
    }


def _shares(found: Figures) -> str:
    return "".join(
        f"{found[unit]['dataset']['bits']['share']:9.0%}{found[unit]['text']['bits']['share']:6.0%}"
        f"{found[unit]['type']['bits']['share']:6.0%}{found[unit]['dataset']['distinct']['mean']:7.1f}"
        f"{found[unit]['dataset']['largest']['mean']:6.0%}"
        for unit in UNITS
    )


def _line(plan: Figures) -> str:
    spent = plan["cost"]
    return (
        f"{plan['batch']:10}{plan['row_group_cells']:6}{plan['window_steps']:6}{_shares(plan)}"
        f"{spent['rows_read_per_row']:10.2f}{spent['files']:8.1f}{spent['window_mb']:8.1f}"
    )


def _table(summary: Figures) -> str:
    return "\n".join([*headline(summary), "", *_lines(summary["details"])])


def _lines(details: Figures) -> Iterator[str]:
    """One line a plan, and those without a plan: bits as shares of the full shuffle's."""
    columns = f"{'dataset':>9}{'text':>6}{'type':>6}{'datas.':>7}{'top':>6}"
    yield f"{'':22}{'of a global batch':>34}{'of a micro-batch':>34}{'of a window':>26}"
    yield f"{'batch':10}{'rows':>6}{'steps':>6}{columns}{columns}{'read/row':>10}{'files':>8}{'MB':>8}"
    for batch, full in details["full_shuffle"].items():
        yield f"{batch:10}{'full':>12}{_shares(_with_shares(full, full))}"
        yield from (_line(plan) for plan in details["plans"] if plan["batch"] == batch)
        yield f"{batch:10}{'none':>12}{_shares(details['no_shuffle'][batch])}"


def _check(options: ShuffleOptions) -> None:
    if len(options.global_batch) != len(options.micro_batch) or not options.global_batch:
        raise InputError(
            f"--global_batch {options.global_batch} and --micro_batch {options.micro_batch} go together, one "
            "of each a measurement."
        )
    for name in ("global_batch", "micro_batch", "row_group_cells", "window_steps"):
        if min(getattr(options, name), default=1) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; each must be 1 at least.")
    if options.cells < 1:
        raise InputError(f"--cells is {options.cells}; it must be 1 at least.")
    for global_batch, micro_batch in zip(options.global_batch, options.micro_batch, strict=True):
        Plan((), options.seed, global_batch, micro_batch, 1)
