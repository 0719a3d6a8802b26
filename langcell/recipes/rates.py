"""How fast a worker computes, for forecasts: from the benchmarks' records, or assumed and said to be.

The newest record of `jobs/bench.py step` on such a device tells the operations a second; that of
`jobs/bench.py scale` what more workers cost each other.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langcell.config import Config
from langcell.errors import InputError
from langcell.model.flops import peak_flops

ASSUMED_MFU = 0.4
"""Where no record is of such a GPU: the aim of the design."""
GPUS = {"A100-40G": ("A100", 40), "A100-80G": ("A100", 80), "H100": ("H100", 80), "H200": ("H200", 141)}
"""Kinds of GPU by Ray's names: as `model.flops` knows them, and memory (GiB)."""


@dataclass(frozen=True)
class Rate:
    """Operations a second of one worker (1/s), and how they are known."""

    flops: float
    known: str


def gpu_kind(config: Config) -> str | None:
    """Ray's name of the GPU that workers take; None: they run on CPUs."""
    train = config.train
    if train.gpus is False or (train.gpus is None and not torch.version.cuda and train.accelerator is None):
        return None
    kind = train.accelerator or "A100-40G"
    if kind not in GPUS:
        raise InputError(f"train.accelerator: --plan knows {', '.join(GPUS)}, not {kind!r}.")
    return kind


def rate_of(kind: str | None, config: Config, records: Path) -> Rate:
    """From the newest record of such a device, else assumed."""
    for record in _records(records / "step.jsonl"):
        stages = record["figures"]["details"]["sizes"].values()
        device = next(iter(stages))["1"]["device"]["name"]
        measured = [stage["ours"] for size in stages for stage in size.values()]
        if kind is None and device == "cpu":
            of_core = np.mean([one["flops_per_s"] for one in measured]) / record["machine"]["cores"]
            cores = os.cpu_count() or 1
            return Rate(
                float(of_core * cores / config.train.num_workers),
                f"{of_core / 1e9:.0f} GFLOP/s a core, measured on {record['machine']['cores']} cores of "
                f"{record['machine']['cpu']} ({record['date'][:10]}); {cores} cores here",
            )
        if kind is not None and GPUS[kind][0] in device:
            share = float(np.mean([one["mfu"] for one in measured]))
            peak = peak_flops(GPUS[kind][0])
            assert peak is not None
            return Rate(share * peak, f"MFU {share:.0%}, measured on {device} ({record['date'][:10]})")
    if kind is None:
        raise InputError(
            f"no record of a CPU in {records}/step.jsonl: python jobs/bench.py step --record true"
        )
    peak = peak_flops(GPUS[kind][0])
    assert peak is not None
    return Rate(
        ASSUMED_MFU * peak,
        f"MFU {ASSUMED_MFU:.0%}, ASSUMED: no record of such a GPU (python jobs/bench.py step --device cuda "
        "--record true measures it)",
    )


def efficiency(records: Path, stage: int, zero: int, workers: int) -> float:
    """Share of `workers` times one worker's rate, by the newest model of scaling; 1 where there is none."""
    for record in _records(records / "scale.jsonl"):
        points = record["figures"]["details"]["model"][f"stage {stage}, ZeRO {zero}"]
        gpus, shares = [1, *(p["gpus"] for p in points)], [1.0, *(p["efficiency"] for p in points)]
        return float(np.interp(np.log2(workers), np.log2(gpus), shares))
    return 1.0


def _records(path: Path) -> list[dict[str, Any]]:
    """The newest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in reversed(path.read_text().splitlines())]
