"""A Ray head of a test's own: its ports, its folder, loopback only.

`ray stop` would end every Ray of the machine, so the processes are remembered and ended by pid.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

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


@dataclass(frozen=True)
class Head:
    """Where it answers, where its files lie (`--temp-dir`), and the environment of who talks to it."""

    dashboard: str
    metrics: str
    dir: Path
    environment: dict[str, str]

    def submit(self, name: str, *command: str, upload: bool = True) -> None:
        """`ray job submit` of the checkout, as a user does it; upload: as the job's working directory."""
        where = [f"--address={self.dashboard}", f"--submission-id={name}", "--no-wait"]
        where += ["--working-dir=."] if upload else []
        submitted = subprocess.run(
            [BIN / "ray", "job", "submit", *where, "--", *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr


def free_ports(n: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running_head(
    launcher: Sequence[str | Path] = (BIN / "ray", "start", "--head", "--block"), **environment: str
) -> Iterator[Head]:
    """launcher: what starts the head; environment: of the head, beside what every test needs."""
    # Not pytest's folder: the path of a Unix socket in it must stay below 108 bytes.
    directory = Path(tempfile.mkdtemp(prefix="langcell-"))
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # an activated environment
        "RAY_AUTH_MODE": "disabled",
        # What `ray start` leaves of a cluster that is killed would mislead the next Ray of the machine.
        "RAY_TMPDIR": str(directory),
        "RAY_metrics_report_interval_ms": "500",  # 10 s by default: this run is about as short
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain at the end
        **environment,
    }
    command = [*launcher, "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={directory}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = (directory / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    head = Head(
        f"http://127.0.0.1:{ports['dashboard-port']}",
        f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
        directory,
        environment,
    )
    try:
        wait_until_up(process, f"{head.dashboard}/api/jobs/", directory / "head.log")
        yield head
    finally:
        end(process)
        log.close()
        shutil.rmtree(directory, ignore_errors=True)


def wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server answers at `url`, 180 s at most."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    pytest.fail(f"nothing at {url} within 180 s: {log.read_text()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """A process, and whatever it started that outlives it."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=10)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=10)


def demo_job(folder: Path, *options: str) -> list[str]:
    """The main job over the embedded cells, one epoch a stage; `folder` is every directory's."""
    places = [f"--run.dir={folder / 'watched'}", f"--corpus.dir={folder / 'corpus'}"]
    places += [f"--census.dir={folder / 'census'}"]
    short = ["--train.stage1_epochs=1", "--train.stage2_epochs=1"]
    return ["python", "jobs/pretrain.py", *places, *short, *options]
