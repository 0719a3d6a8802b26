"""`bench.py data`: its rows and figures, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from langcell.bench import data
from langcell.bench.figures import Size, pass_rates, rates, row
from langcell.bench.processes import Family, Run
from langcell.bench.ray_work import Passed

ROWS = ["token_kernel", "soma_to_parquet", "read_bound", "beta"]


def test_rates_of_a_run() -> None:
    done = Run(walls_s=[3.0, 2.0, 9.0], cpus_s=[4.0, 5.0, 5.5], peak_mb=100, values=[None] * 3)
    found = rates(done, Size(cells=600, nnz=3_000_000, x_bytes=6_000_000), cpus=2)
    assert (found["wall_s"], found["cpu_s"]) == (3.0, 5.0)
    assert (found["cells_per_s"], found["cells_per_cpu_s"], found["nnz_per_cpu_s"]) == (200, 120, 600_000)
    assert (found["disk_mb_per_s"], found["payload_mb_per_s"]) == (2, 8)
    assert found["busy"] == pytest.approx(5 / 3 / 2)
    assert "disk_mb_per_s" not in rates(done, Size(600, 3_000_000, 0))
    better = row({"cells_per_s": 300, "peak_mb": 7}, found, "cells_per_s", "cells/s")
    assert better == {"ours": 300, "baseline": 200, "ratio": 1.5, "unit": "cells/s", "peak_mb": 7}


def test_a_pass_counts_all_of_ray() -> None:
    families = [Family(cpu_s=cpu, worker_cpu_s=cpu - 1, workers=2, worker_peak_mb=cpu) for cpu in (6, 4, 5)]
    done = Run([2.5] * 3, [0.5] * 3, 300, [Passed("hash", family) for family in families])
    found = pass_rates(done, Size(1_000, 10, 10), cpus=2)
    assert (found["cpu_s"], found["worker_cpu_s"], found["busy"]) == (5, 4, 1.0)
    assert (found["worker_peak_mb"], found["peak_mb"]) == (6, 300)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["data", "--cells", "0"], "--cells is 0"),
        (["data", "--repeats", "0"], "--repeats is 0"),
        (["data", "--cpus", "[1, 4096]"], "--cpus is [1, 4096]"),
        (["data", "--cpus", "[]"], "--cpus is []"),
        (["data", "--cell", "10"], "--cell"),
        (["data", "--cells", "many"], "cells"),
        (["dta"], "dta"),
        ([], "data"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], told: str, refused: Callable[[list[str]], str]
) -> None:
    assert told in refused(argv)


@pytest.mark.slow
def test_a_small_benchmark(
    tmp_path: Path, measured: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "--cells", "600", "--baseline_cells", "100", "--cpus", "[1]", "--repeats", "1"]
    summary = measured(argv, ROWS)
    assert all(summary[name]["peak_mb"] > 100 for name in ROWS)
    record = json.loads((tmp_path / "records" / "data.jsonl").read_text())
    assert record["parameters"]["cells"] == 600
    details = summary["details"]
    assert details["corpus"]["cells"] == 600
    assert list(details["token_road"]["stages_cpu_s"]) == ["read", "csr", "tokens", "write"]
    assert [kernel.get("differing_cells") for kernel in details["kernels"].values()] == [None, 0, 0, 0]
    for name in ("beta pass", "token pass", "prepare"):
        found = details["passes"][name]["1"]
        assert found["workers"] >= 1
        assert found["worker_peak_mb"] > found["worker_private_mb"] > 50
        assert found["busy"] > 0
    assert "token_kernel" in capsys.readouterr().out
    left = sorted(os.listdir(tmp_path / "bench"))
    assert left[0] == "summary.json"
    assert len(left) == 2
    assert left[1].startswith("synthetic-600-seed-0-")
    assert data.table(summary).count("\n") > 12
