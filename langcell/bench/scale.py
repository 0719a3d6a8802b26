"""What a step costs as GPUs are added: bytes measured here, a paper model of 8 to 256 A100s from them.

Measured: every collective of a real step (kind, dtype, bytes) at a few workers, both stages, each ZeRO
stage; and how many cells a second one CPU makes ready from token blocks. Modelled, with every assumption in
the output and in the record: compute, communication and the data road of nodes with eight A100s
(`bench.scaling`). Headline rows, one a stage at ZeRO `model_zero`: cells/s of the most GPUs (ours) beside as
many times one GPU alone (baseline); their ratio is the efficiency.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from langcell.bench import records
from langcell.bench.collectives import Collective
from langcell.bench.figures import Figures, headline
from langcell.bench.options import ScaleOptions
from langcell.bench.processes import MB, alone
from langcell.bench.ranks import run_ranks
from langcell.bench.scale_work import (
    CONTEXT,
    GENES_MEAN,
    GENES_SPREAD,
    MASKED,
    TEXT_TOKENS,
    VOCABULARY,
    count_collectives,
    flops_of_step,
    road,
)
from langcell.bench.scaling import Cluster, Line, Predicted, Step, lines, predict
from langcell.errors import InputError
from langcell.model.cell_encoder import scratch_config
from langcell.model.interop import load_config, text_path
from langcell.model.options import ModelOptions

GPUS = (8, 16, 32, 64, 128, 256)
STAGES = (1, 2)
ZEROS = (1, 2, 3)
PRODUCTS = {1: 3, 2: 3 + 6 + 2}
"""Local rows times gathered rows in a step: C-C forward and backward, C-T both ways, the mining's scores."""
ROAD_REPEATS = 3
Name = tuple[int, int]
"""Stage and ZeRO stage."""


def run(options: ScaleOptions) -> Figures:
    """Measure, model, print both, write summary.json in `options.dir`; what stands there.

    Raises InputError for options that cannot be.
    """
    if min(options.workers, default=0) < 1 or options.cells < 2 or not 0 < options.mfu <= 1:
        raise InputError(
            f"--workers {options.workers}, --cells {options.cells}, --mfu {options.mfu:g}: workers must "
            "be 1 at least, cells 2, and the share of the peak above 0 and at most 1."
        )
    if len({count for count in options.workers if count > 1}) < 2:
        raise InputError("workers: give two counts above 1 at least, a line goes through them")
    directory = Path(os.path.abspath(options.dir))
    directory.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    seen: dict[Name, dict[int, list[Collective]]] = defaultdict(dict)
    peak_mb = 0.0
    for workers in options.workers:
        by_name, rank_peak_mb = run_ranks(count_collectives, workers, options.cells, list(ZEROS))[0]
        peak_mb = max(peak_mb, rank_peak_mb)
        for name, collectives in by_name.items():
            seen[name][workers] = collectives
    with tempfile.TemporaryDirectory(prefix="scale-", dir=directory) as scratch:
        ready = alone(road, scratch, options.cells, repeats=ROAD_REPEATS)
    fitted = {name: lines(by_workers) for name, by_workers in seen.items()}
    rate = ready.values[0] / ready.cpu_s
    modelled = {name: _modelled(name[0], fitted[name], options, rate) for name in fitted}
    summary: Figures = {
        f"stage{stage}": _row(modelled[stage, options.model_zero], peak_mb) for stage in STAGES
    }
    summary["details"] = {
        "assumptions": _assumptions(options, rate),
        "collectives": {_label(name): _measured(by_workers) for name, by_workers in seen.items()},
        "lines": {_label(name): [dataclasses.asdict(line) for line in fitted[name]] for name in fitted},
        "model": {_label(name): [dataclasses.asdict(each) for each in modelled[name]] for name in modelled},
        "road": {"cells_per_cpu_s": rate, "cpus_s": ready.cpus_s, "peak_mb": ready.peak_mb},
        "gpu": "not measured: a model",
        "load_average_before": load,
    }
    records.publish("scale", options, summary, _table(summary))
    return summary


def _label(name: Name) -> str:
    return f"stage {name[0]}, ZeRO {name[1]}"


def _modelled(
    stage: int, fitted: Sequence[Line], options: ScaleOptions, cells_per_cpu_s: float
) -> list[Predicted]:
    model = ModelOptions()
    cell = scratch_config(model, VOCABULARY, CONTEXT)
    text = load_config(text_path(model.text_init), "model.text_init")
    flops = flops_of_step(stage, cell, text, model.projection, options.cells)
    step = Step(flops, options.cells, PRODUCTS[stage], model.projection)
    return [predict(step, fitted, Cluster(), gpus, options.mfu, cells_per_cpu_s) for gpus in GPUS]


def _row(modelled: list[Predicted], peak_mb: float) -> Figures:
    last = modelled[-1]
    return {
        "ours": last.cells_per_s,
        "baseline": last.cells_per_s / last.efficiency,
        "ratio": last.efficiency,
        "unit": f"cells/s of {last.gpus} A100s (model)",
        "peak_mb": peak_mb,
    }


def _measured(by_workers: Mapping[int, Sequence[Collective]]) -> dict[str, list[Figures]]:
    """By workers, every kind of collective with its number and bytes; equal ones are one entry."""
    listed = {}
    for workers, collectives in by_workers.items():
        groups: dict[tuple[str, str, str, int, int], int] = defaultdict(int)
        for one in collectives:
            groups[one.origin, one.kind, one.dtype, one.handed, one.received] += 1
        listed[str(workers)] = [
            dict(zip(("origin", "kind", "dtype", "handed", "received"), group, strict=True)) | {"count": n}
            for group, n in groups.items()
        ]
    return listed


def _assumptions(options: ScaleOptions, cells_per_cpu_s: float) -> list[str]:
    cluster = Cluster()
    return [
        f"6 layers of 256, vocabulary {VOCABULARY:,}, MiniLM text, bf16, {options.cells} cells a GPU and "
        "step; the global batch grows with the GPUs",
        f"cells: lognormal, {GENES_MEAN:,.0f} genes expressed in the mean, deviation of the log "
        f"{GENES_SPREAD}, cut to {CONTEXT:,} tokens; {MASKED:.0%} masked; stage 2: a text of {TEXT_TOKENS} "
        "tokens and three pairs a cell",
        f"MFU {options.mfu:.0%} of {cluster.flops / 1e12:.0f} TFLOP/s; contrastive products in float32 at "
        f"the same share of {cluster.float32_flops / 1e12:.1f} (a lower MFU: lower rates, higher "
        "efficiency)",
        f"{cluster.node} GPUs a node, NVLink {cluster.link / 1e9:.0f} GB/s a GPU, network "
        f"{cluster.network / 1e9:.0f} GB/s a node, {cluster.reached:.0%} of both reached; "
        f"{cluster.latency_s * 1e6:.0f} and {cluster.network_latency_s * 1e6:.0f} us a collective for each "
        "doubling of GPUs in a node and of nodes",
        "nothing overlaps; no rank waits for another's longer cells; no congestion, no slow node",
        f"data road: {cells_per_cpu_s:,.0f} cells per CPU second, measured here from a local file (tokens to "
        f"micro-batches; Ray's own share not counted); {cluster.cpus} logical CPUs a node",
    ]


def _table(summary: Figures) -> str:
    details = summary["details"]
    lines = [*headline(summary), "\nmeasured bytes of a step's collectives (MB of whole messages)"]
    for name, by_workers in details["collectives"].items():
        for workers, groups in by_workers.items():
            sums = {
                who: sum(
                    group["count"] * max(group["handed"], group["received"])
                    for group in groups
                    if group["origin"].startswith(who)
                )
                / MB
                for who in ("langcell", "deepspeed")
            }
            number = sum(group["count"] for group in groups)
            lines.append(
                f"{name:20}{workers:>3} workers  ours {sums['langcell']:8.3f}  "
                f"DeepSpeed {sums['deepspeed']:8.1f}  collectives {number:4}"
            )
    lines += ["\nassumed", *(f"- {each}" for each in details["assumptions"])]
    lines.append(
        f"\n{'modelled, ms a step':20}{'GPUs':>5}{'compute':>9}{'contrast':>9}{'collect.':>9}{'cells/s':>10}"
        f"{'efficiency':>11}{'CPUs used':>10}"
    )
    for name, rows in details["model"].items():
        lines += [
            f"{name:20}{each['gpus']:>5}{1e3 * each['compute_s']:9.1f}{1e3 * each['contrast_s']:9.2f}"
            f"{1e3 * each['collectives_s']:9.1f}{each['cells_per_s']:10,.0f}{each['efficiency']:11.1%}"
            f"{each['cpu_share']:10.1%}"
            for each in rows
        ]
    return "\n".join(lines)
