"""The main job as a cluster user runs it: `ray start --head`, `ray job submit`, metrics scraped meanwhile.

The head is this test's own: its ports, its folder, loopback only. `ray stop` would end every Ray of the
machine, so the processes are remembered and ended by pid.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
)
GAUGES = {
    "ray_langcell_loss",
    "ray_langcell_cells_per_s",
    "ray_langcell_tokens_per_s",
    "ray_langcell_data_wait",
}
MINUTES = 60.0


@dataclass
class Head:
    dashboard: str
    metrics: str
    dir: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Not pytest's folder: the path of a Unix socket in it must stay below 108 bytes.
    directory = Path(tempfile.mkdtemp(prefix="langcell-"))
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = dict(zip(PORTS, (one.getsockname()[1] for one in sockets), strict=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # an activated environment
        "RAY_AUTH_MODE": "disabled",
        "RAY_metrics_report_interval_ms": "500",  # 10 s by default: this run is about as short
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain at the end
    }
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={directory}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = (directory / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    started = Head(
        f"http://127.0.0.1:{ports['dashboard-port']}",
        f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
        directory,
        environment,
    )
    try:
        wait_for_dashboard(process, started)
        yield started
    finally:
        end(process)
        log.close()
        shutil.rmtree(directory, ignore_errors=True)


def wait_for_dashboard(process: subprocess.Popen[bytes], head: Head) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, (head.dir / "head.log").read_text()
        try:
            if requests.get(f"{head.dashboard}/api/jobs/", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    pytest.fail(f"no dashboard within 90 s: {(head.dir / 'head.log').read_text()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """The head, and whatever it started that outlives it."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=10)


def scrape(head: Head) -> dict[str, dict[str, float]]:
    """langcell's gauges that stand on the node's endpoint now: name -> label set -> value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(requests.get(head.metrics, timeout=10).text):
        for sample in family.samples:
            if sample.name.startswith("ray_langcell_"):
                labels = {k: sample.labels[k] for k in ("run", "stage", "loss") if k in sample.labels}
                found.setdefault(sample.name, {})[json.dumps(labels, sort_keys=True)] = sample.value
    return found


@pytest.mark.slow
def test_submitted_job_trains_and_is_watched(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "watched"
    options = [
        f"--run.dir={run}",
        f"--corpus.dir={tmp_path / 'corpus'}",
        f"--census.dir={tmp_path / 'census'}",
    ]
    options += ["--train.stage1_epochs=1", "--train.stage2_epochs=1"]
    where = [f"--address={head.dashboard}", "--submission-id=watched", "--working-dir=.", "--no-wait"]
    submitted = subprocess.run(
        [BIN / "ray", "job", "submit", *where, "--", "python", "jobs/pretrain.py", *options],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    client = JobSubmissionClient(head.dashboard)
    seen: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + 12 * MINUTES
    while not (status := client.get_job_status("watched")).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs("watched")[-4000:]
        for name, values in scrape(head).items():
            seen.setdefault(name, {}).update(values)
        time.sleep(1)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs("watched")[-4000:]

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] > 0
    assert Path(summary["export"]).is_dir()
    assert f"summary  {run / 'summary.json'}" in client.get_job_logs("watched")

    assert set(seen) >= GAUGES, f"on the endpoint: {sorted(seen)}"
    assert all(math.isfinite(value) for values in seen.values() for value in values.values())
    rates = [*seen["ray_langcell_cells_per_s"].values(), *seen["ray_langcell_tokens_per_s"].values()]
    assert all(rate > 0 for rate in rates)
    assert all(0 <= wait <= 1 for wait in seen["ray_langcell_data_wait"].values())
    labels = [json.loads(key) for key in seen["ray_langcell_loss"]]
    assert {label["run"] for label in labels} == {"watched"}
    cells = {label["loss"] for label in labels if label["stage"] == "1"}
    both = {label["loss"] for label in labels if label["stage"] == "2"}
    assert cells >= {"mgm", "cc"}
    assert not cells & {"ct", "ctm"}, "stage 1 sees no text"
    assert both >= {"mgm", "cc", "ct", "ctm"}


@pytest.mark.slow
def test_upload_leaves_environment_and_runs_behind(head: Head, tmp_path: Path) -> None:
    """`--working-dir .` of a checkout in use: .gitignore is honoured; Ray refuses more than 500 MiB."""
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in (".venv/lib/torch.so", "runs/demo/export/model.safetensors", ".hypothesis/examples"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"0")

    client = JobSubmissionClient(head.dashboard)
    job = client.submit_job(entrypoint="find . -type f", runtime_env={"working_dir": str(checkout)})
    deadline = time.monotonic() + 2 * MINUTES
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(job)
    there = {Path(line) for line in client.get_job_logs(job).splitlines() if line.startswith("./")}
    assert {Path("jobs/pretrain.py"), Path("langcell/config.py"), Path("jobs/configs/demo.yaml")} <= there
    assert not {path.parts[0] for path in there} & {".venv", "runs", ".git", ".hypothesis"}
