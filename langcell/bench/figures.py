"""Figures of a measurement, the headline rows, and how both are shown.

MB are 10^6 bytes. Of what is read from X, `disk_mb_per_s` counts the bytes that X has on disk (compressed,
1.6 a non-zero) and `payload_mb_per_s` those that come of it (8 a non-zero: gene and count).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from langcell.bench.processes import MB, Run

PAYLOAD_BYTES = 8
"""Bytes of a non-zero in a CSR: gene (int32) and count (float32)."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What was worked on: cells, their non-zeros, and the bytes of their X on disk (0: nothing was read)."""

    cells: int
    nnz: int
    x_bytes: int


def rates(run: Run, size: Size, cpus: int = 1) -> Figures:
    """A piece of work on so many CPUs. `busy`: share of them that was used."""
    return _rates(run, size, cpus, run.cpu_s)


def pass_rates(run: Run, size: Size, cpus: int) -> Figures:
    """A pass through Ray, its values being `Passed`: CPU time and memory of its workers too.

    `cpu_s` and `busy` count all of Ray and the driver; the latter can exceed 1 only by the clock's grain.
    """
    families = [passed.family for passed in run.values]
    return _rates(run, size, cpus, statistics.median(family.cpu_s for family in families)) | {
        "worker_cpu_s": statistics.median(family.worker_cpu_s for family in families),
        "workers": max(family.workers for family in families),
        "worker_peak_mb": max(family.worker_peak_mb for family in families),
        "worker_private_mb": max(family.worker_private_mb for family in families),
    }


def _rates(run: Run, size: Size, cpus: int, cpu_s: float) -> Figures:
    read = {
        "disk_mb_per_s": size.x_bytes / MB / run.wall_s,
        "payload_mb_per_s": PAYLOAD_BYTES * size.nnz / MB / run.wall_s,
    }
    return {
        "cells_per_s": size.cells / run.wall_s,
        "cells_per_cpu_s": size.cells / cpu_s,
        "nnz_per_cpu_s": size.nnz / cpu_s,
        **(read if size.x_bytes else {}),
        "wall_s": run.wall_s,
        "walls_s": run.walls_s,
        "cpu_s": cpu_s,
        "busy": cpu_s / run.wall_s / cpus,
        "peak_mb": run.peak_mb,
    }


def stage_rates(stages: list[dict[str, float]], size: Size, peak_mb: float) -> Figures:
    """A road without Ray: CPU seconds of each stage (median over the repetitions), and its rate."""
    cpu_s = {name: statistics.median(each[name] for each in stages) for name in stages[0]}
    total = sum(cpu_s.values())
    return {
        "stages_cpu_s": cpu_s,
        "cells_per_cpu_s": size.cells / total,
        "nnz_per_cpu_s": size.nnz / total,
        "peak_mb": peak_mb,
    }


def row(ours: Figures, baseline: Figures, figure: str, unit: str, peak: str = "peak_mb") -> Figures:
    """A headline row of one figure of two measurements; the peak is ours."""
    return {
        "ours": ours[figure],
        "baseline": baseline[figure],
        "ratio": ours[figure] / baseline[figure],
        "unit": unit,
        "peak_mb": ours[peak],
    }


def headline(summary: Figures) -> list[str]:
    """The headline rows, to read."""
    lines = [f"{'':18}{'ours':>12}{'baseline':>12}{'ratio':>8}{'peak MB':>9}  unit"]
    for name, each in summary.items():
        if name != "details":
            ours, baseline = (
                f"{figure:12,.0f}" if figure >= 100 else f"{figure:12.3f}"
                for figure in (each["ours"], each["baseline"])
            )
            lines.append(
                f"{name:18}{ours}{baseline}{each['ratio']:8.2f}{each['peak_mb']:9,.0f}  {each['unit']}"
            )
    return lines


def table(summary: Figures) -> str:
    """The headline rows of the data road, its stages and its passes, to read."""
    lines, details = headline(summary), summary["details"]
    lines.append("\nCPU seconds without Ray")
    for name in ("beta_road", "token_road"):
        stages = details[name]["stages_cpu_s"]
        spent = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        lines.append(f"{name:18}{spent} ({details[name]['cells_per_cpu_s']:,.0f} cells/cpu-s)")
    lines.append(
        f"\n{'':18}{'CPUs':>5}{'cells/s':>10}{'disk MB/s':>11}{'payload MB/s':>14}{'busy':>6}{'peak MB':>9}"
        f"{'worker MB':>11}"
    )
    for name, by_cpus in {"raw read": details["raw_read"], **details["passes"]}.items():
        for cpus, each in by_cpus.items():
            worker = f"{each['worker_peak_mb']:11,.0f}" if "worker_peak_mb" in each else ""
            lines.append(
                f"{name:18}{cpus:>5}{each['cells_per_s']:10,.0f}{each['disk_mb_per_s']:11,.1f}"
                f"{each['payload_mb_per_s']:14,.0f}{each['busy']:6.2f}{each['peak_mb']:9,.0f}{worker}"
            )
    return "\n".join(lines)
