"""What a dashboard watches while a stage trains: gauges of rank 0 on Ray's Prometheus endpoint.

`ray_langcell_loss{loss=...}`, and one `ray_langcell_<name>` for each of `GAUGES` and `EVENTS`. A gauge keeps
its value, so one that is set now and then stands between; it goes when the worker's process does (two report
intervals later), and what stands is what lives: alerts need no other sign of life.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from ray.util.metrics import Gauge

GAUGES = {
    "step": "Global step that was trained last, from 0",
    "epoch": "Epoch of the stage, from 0",
    "done": "Share of the steps of the whole run that are trained (0 to 1)",
    "cells_per_s": "Cells trained per second, all workers",
    "tokens_per_s": "Gene tokens trained per second, all workers",
    "mfu": "Share of the devices' peak in bf16 that the step's products took (0 to 1; on known GPUs)",
    "data_wait": "Share of the step's time that the last worker waited for data (0 to 1)",
    "peak_memory_bytes": "Most memory that rank 0 held: PyTorch's on its GPU, resident where it is a CPU",
    "grad_norm": "Global gradient norm before clipping",
    "skipped": "Steps of the stage whose update was left out",
    "ctm_empty": "Draws of matching pairs that found no partner in the global batch",
    "lr": "Learning rate of the cell side",
}
"""Set from the row of each step."""
EVENTS = {
    "checkpoint_time_seconds": "Unix time of the last checkpoint; before the first, when the workers began",
    "recoveries": "Interruptions after which the run went on from a checkpoint",
    "steps_replayed": "Steps that were trained again because of them",
}


class Gauges:
    """The gauges of one stage; recoveries: those of the run so far (`recoveries.jsonl`); saved: when the
    checkpoint was made that it goes on from (s since 1970), if there is one."""

    def __init__(self, run: str, stage: int, recoveries: list[dict[str, Any]], saved: float | None) -> None:
        tags = {"run": run, "stage": str(stage)}
        self._gauges = {
            name: Gauge(f"langcell_{name}", text, tuple(tags)) for name, text in (GAUGES | EVENTS).items()
        }
        self._loss = Gauge("langcell_loss", "Loss over the global batch", (*tags, "loss"))
        for gauge in (*self._gauges.values(), self._loss):
            gauge.set_default_tags(tags)
        self._gauges["recoveries"].set(len(recoveries))
        self._gauges["steps_replayed"].set(sum(each["steps_replayed"] for each in recoveries))
        self._gauges["checkpoint_time_seconds"].set(time.time() if saved is None else saved)

    def step(self, row: dict[str, Any], losses: tuple[str, ...]) -> None:
        """A step's row; what is None, or not in it, keeps its last value."""
        for name in GAUGES:
            if row.get(name) is not None:
                self._gauges[name].set(row[name])
        for name in losses:
            if row[name] is not None:
                self._loss.set(row[name], {"loss": name})

    def committed(self) -> None:
        """A checkpoint was committed just now."""
        self._gauges["checkpoint_time_seconds"].set(time.time())


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held (bytes): PyTorch's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
