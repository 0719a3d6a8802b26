"""What a run says while it runs: metrics.jsonl, and gauges on Ray's Prometheus endpoint.

One JSON object a step, appended by rank 0; a resume first cuts the file back to its cursor, so that
every step stands in it once (what was cut is counted in recoveries.jsonl). The gauges are what a
dashboard watches: `ray_langcell_loss{loss=...}` and one `ray_langcell_<name>` for each of `GAUGES`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from langcell.files import write_whole

METRICS = "metrics.jsonl"
RECOVERIES = "recoveries.jsonl"
GAUGES = {
    "cells_per_s": "Cells trained per second, all workers",
    "tokens_per_s": "Gene tokens trained per second, all workers",
    "mfu": "Share of the devices' peak in bf16 that the step's products took (0 to 1; on known GPUs)",
    "data_wait": "Share of the step's time that the last worker waited for data (0 to 1)",
    "grad_norm": "Global gradient norm before clipping",
    "ctm_empty": "Draws of matching pairs that found no partner in the global batch",
    "lr": "Learning rate of the cell side",
}


class Metrics:
    """The writer of rank 0.

    directory: of the run; first_step: global step that the run goes on from.
    """

    def __init__(self, directory: Path, run: str, stage: int, first_step: int) -> None:
        cut_back(directory, stage, first_step)
        self._file = (directory / METRICS).open("a")
        tags = {"run": run, "stage": str(stage)}
        self._gauges = {
            name: Gauge(f"langcell_{name}", text, ("run", "stage")) for name, text in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)
        self._loss = Gauge("langcell_loss", "Loss over the global batch", ("run", "stage", "loss"))
        self._loss.set_default_tags(tags)

    def write(self, row: dict[str, Any], losses: dict[str, float]) -> None:
        """One step: the row goes to the file with its losses, both to the gauges."""
        self._file.write(json.dumps({**row, **losses}) + "\n")
        self._file.flush()
        for name, gauge in self._gauges.items():
            if row[name] is not None:
                gauge.set(row[name])
        for name, loss in losses.items():
            self._loss.set(loss, {"loss": name})

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; a line that a crash left half-written is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def cut_back(directory: Path, stage: int, first_step: int) -> None:
    """Drop a stage's rows from global step `first_step` on, atomically, and note the recovery.

    Rows of the other stage stay: a finished stage that is passed through again cuts nothing.
    """
    path = directory / METRICS
    rows = read(path)
    kept = [row for row in rows if row["stage"] != stage or row["step"] < first_step]
    if path.exists():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    if len(kept) == len(rows):
        return
    recovery = {"step": first_step, "steps_replayed": len(rows) - len(kept), "stopped": rows[-1]["time"]}
    with (directory / RECOVERIES).open("a") as file:
        file.write(json.dumps(recovery) + "\n")
