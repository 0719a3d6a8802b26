"""The autoscaling cluster of one machine: a job brings nodes up, trains on them, and they go."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.jobs.head import ROOT, Head, demo_job, running_head
from tests.small_text import small_text


def small(folder: Path) -> list[str]:
    """Options of a model whose training is seconds; its text encoder is written into `folder`."""
    options = ["--model.cell_layers=1", "--model.cell_width=32", "--objective.ctm_cells=1"]
    return [*options, f"--model.text_init={small_text(folder / 'text')}"]


def alive(head: Head) -> dict[str, list[dict[str, float]]]:
    """Resources of the living nodes, by node type."""
    found = requests.get(f"{head.dashboard}/api/v0/nodes", params={"detail": 1}, timeout=10).json()
    types: dict[str, list[dict[str, float]]] = {}
    for node in found["data"]["result"]["result"]:
        if node["state"] == "ALIVE":
            resources = node["resources_total"]
            worker = "trainer" if "trainer" in resources else "data"
            name = "head" if "node:__internal_head__" in resources else worker
            types.setdefault(name, []).append(resources)
    return types


@pytest.mark.slow
def test_a_job_brings_nodes_up_and_they_go(tmp_path: Path) -> None:
    launcher = [sys.executable, str(ROOT / "cluster" / "local.py"), "--idle-timeout-minutes=0.5"]
    with running_head(launcher) as head:
        deadline = time.monotonic() + 120
        while not alive(head) and time.monotonic() < deadline:
            time.sleep(0.5)  # the dashboard has not heard of the head yet
        assert list(alive(head)) == ["head"], "nodes stand there before anybody asked"
        resources = '--train.worker_resources={"trainer": 1}'
        _, _, *options = demo_job(tmp_path, "--train.cpus_per_worker=0", resources, *small(tmp_path))
        head.submit("scaled", "python", str(ROOT / "jobs" / "pretrain.py"), *options, upload=False)
        client = JobSubmissionClient(head.dashboard)
        most: dict[str, int] = {}
        deadline = time.monotonic() + 800
        while not (status := client.get_job_status("scaled")).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs("scaled")[-4000:]
            for name, nodes in alive(head).items():
                most[name] = max(most.get(name, 0), len(nodes))
            time.sleep(1)
        assert status == JobStatus.SUCCEEDED, client.get_job_logs("scaled")[-4000:]
        assert most["trainer"] == 1
        assert 1 <= most["data"] <= 2
        summary = json.loads((tmp_path / "watched" / "summary.json").read_text())
        assert summary["rows_repeated"] == summary["rows_skipped"] == 0
        deadline = time.monotonic() + 180
        while set(alive(head)) != {"head"}:
            assert time.monotonic() < deadline, f"they stay: {alive(head)}"
            time.sleep(1)
