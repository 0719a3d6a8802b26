"""The image's health check, as a job's container and as a node of a cluster."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._common.utils import get_ray_address_file
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

from tests.docker.reading import ROOT
from tests.jobs.head import free_ports

HEALTH = ROOT / "docker" / "health.py"
PORTS = ("port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")


def check(directory: Path, *interpreter: str) -> subprocess.CompletedProcess[str]:
    """As HEALTHCHECK runs it, where nothing but what lies in the directory was started."""
    environment = os.environ | {"RAY_TMPDIR": str(directory)}
    command = [sys.executable, *interpreter, str(HEALTH)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


def test_looks_where_ray_start_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    module = runpy.run_path(str(HEALTH))
    assert module["CLUSTER"] == Path(get_ray_address_file(None))
    assert module["AGENT"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_job_is_in_order_while_its_package_can_be_imported(tmp_path: Path) -> None:
    found = check(tmp_path)
    assert found.returncode == 0, found.stderr
    broken = check(tmp_path, "-S")  # no installed package is seen
    assert broken.returncode == 1
    assert "langcell" in broken.stderr


def test_node_that_is_gone_is_not_in_order(tmp_path: Path) -> None:
    """Its address is left behind, and its port, one that nothing listens on, refuses."""
    address = tmp_path / "ray_current_cluster"
    address.write_text("127.0.0.1:6379")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        assert f"does not answer on port {port}" in runpy.run_path(str(HEALTH))["trouble"](address, port)


@pytest.fixture
def node() -> Iterator[tuple[subprocess.Popen[bytes], Path, int]]:
    """A head with token authentication on: its process, folder and the port of its agent."""
    directory = Path(tempfile.mkdtemp(prefix="langcell-"))  # a Unix socket's path has 107 bytes
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--include-dashboard=false"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_TMPDIR": str(directory),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test-alone",
    }
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process, directory, ports["dashboard-agent-listen-port"]
    finally:
        # Ending for want of its raylet, `ray start` may hold the lock that its handler of SIGTERM takes.
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *family):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(10)
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_node_is_in_order_while_its_raylet_lives(node: tuple[subprocess.Popen[bytes], Path, int]) -> None:
    """Without the token, which the check does not have."""
    process, directory, port = node
    trouble = runpy.run_path(str(HEALTH))["trouble"]
    address = directory / "ray" / "ray_current_cluster"

    def wait(until: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 60
        while not (met := until()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return met

    assert wait(lambda: address.exists() and trouble(address, port) is None), (directory / "log").read_text()
    for raylet in psutil.Process(process.pid).children(recursive=True):
        if raylet.name() == "raylet":
            raylet.kill()
    assert wait(lambda: trouble(address, port) is not None)
