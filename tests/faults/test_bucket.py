"""A run that lives in a bucket, its driver killed: gone on with from there, and whole there in the end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.making import STEPS, Straight, Tiny, argv
from tests.s3server import ENVIRONMENT, SECRET, S3Server, s3_server

JOB = Path(__file__).parents[2] / "jobs" / "pretrain.py"


@pytest.fixture
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        server.client.create_bucket(Bucket="runs")
        yield server


@pytest.mark.slow
def test_a_run_lives_in_a_bucket(straight: Straight, tiny: Tiny, tmp_path: Path, server: S3Server) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(JOB), *argv(tiny.folder), f"--run.dir={server.uri('runs/one')}"]
    command += ["--run.resume=auto", "--run.ray_address=local"]
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}

    def submit() -> subprocess.Popen[bytes]:
        with log.open("ab") as said:
            return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)

    job, deadline = submit(), time.monotonic() + 600
    while "one/checkpoints/stage1/step-00000012/checkpoint.json" not in server.keys(
        "runs", "one/checkpoints"
    ):
        assert job.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert submit().wait(700) == 0, log.read_text()[-4000:]

    keys = server.keys("runs", "one/")
    assert {f"one/{name}" for name in ("config.yaml", "report/index.html", "export/config.json")} <= set(keys)
    assert not [key for key in keys if key.endswith(".tmp")]
    rows = [json.loads(line) for line in server.get("runs", "one/metrics.jsonl").splitlines()]
    assert [(row["step"], row["mgm"]) for row in rows] == [loss[:2] for loss in Tiny.losses(straight.run_dir)]
    parts = [
        pq.read_table(io.BytesIO(server.get("runs", key)))
        for key in keys
        if key.startswith("one/trace/") and key.endswith(".parquet")
    ]
    assert sum(map(len, parts)) == STEPS * 16
    summary = json.loads(server.get("runs", "one/summary.json"))
    assert summary["rows_repeated"] == summary["rows_skipped"] == 0
    assert summary["steps_replayed"] <= 8
    assert len(summary["recoveries_s"]) == 1
    assert SECRET not in log.read_text() + server.get("runs", "one/config.yaml").decode()
