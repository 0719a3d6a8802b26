"""The job as it is submitted to a cluster of three hosts, none of which answers without the token."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_local import small
from tests.faults.hosts import BIN, Resources, three_hosts
from tests.jobs.head import ROOT, demo_job

HOSTS = (Resources(0), Resources(2, {"trainer": 1}), Resources(2, {"trainer": 1}))
DASHBOARD = "http://10.77.0.1:8265"
ASK = "import sys, requests; print(requests.get(sys.argv[1], timeout=20).status_code)"
JOIN = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR')"


@pytest.mark.slow
def test_a_job_on_three_hosts_with_a_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    resources = '--train.worker_resources={"trainer": 1}'
    job = demo_job(tmp_path, "--train.cpus_per_worker=0", resources, *small(tmp_path))
    submit = [BIN / "ray", "job", "submit", f"--address={DASHBOARD}", "--working-dir=.", "--", *job]
    with three_hosts(HOSTS, environment, dashboard=True) as net:
        log = (tmp_path / "log").open("wb")
        submitted = net.run(submit, 1, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # Meanwhile a host without the token asks for the jobs, and to join.
        without = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/dev/null"}
        ask = [sys.executable, "-c", ASK, f"{DASHBOARD}/api/jobs/"]
        refused = net.run(ask, 2, without, stdout=subprocess.PIPE, text=True)
        assert refused.communicate(timeout=60)[0].strip() == "401"
        join = net.run([sys.executable, "-c", JOIN, "10.77.0.1:6379"], 2, without, stderr=subprocess.PIPE)
        assert b"uthenti" in join.communicate(timeout=120)[1]
        assert join.returncode != 0
        assert submitted.wait(800) == 0, (tmp_path / "log").read_text()[-6000:]
        said = (tmp_path / "log").read_text()
    assert token.read_text() not in said
    summary = json.loads((tmp_path / "watched" / "summary.json").read_text())
    assert summary["steps"] > 0
    assert summary["rows_repeated"] == summary["rows_skipped"] == 0
