"""The main job, killed and told to stop, and submitted again by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.making import STEPS, Straight, Tiny, argv, last_step, same

JOB = Path(__file__).parents[2] / "jobs" / "pretrain.py"


def submit(tiny: Tiny, run_dir: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(JOB), *argv(tiny.folder), f"--run.dir={run_dir}", "--run.resume=auto"]
    with log.open("ab") as said:
        return subprocess.Popen(
            [*command, "--run.ray_address=local", *more],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )


def wait_for_step(job: subprocess.Popen[bytes], run_dir: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while last_step(run_dir) < step:
        assert job.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [
        {9: signal.SIGKILL, 30: signal.SIGTERM},
        pytest.param({9: signal.SIGKILL, 30: signal.SIGTERM, 50: signal.SIGINT}, marks=pytest.mark.soak),
    ],
    ids=["twice", "thrice"],
)
def test_the_same_command_goes_on(
    straight: Straight, tiny: Tiny, tmp_path: Path, signals: dict[int, signal.Signals]
) -> None:
    """SIGKILL of the driver, which takes its whole Ray with it; SIGTERM; ctrl-C; and to the end."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    for step, number in signals.items():
        code = -9 if number == signal.SIGKILL else 75
        job = submit(tiny, run_dir, log)
        wait_for_step(job, run_dir, step, log)
        job.send_signal(number)
        assert job.wait(300) == code, log.read_text()[-4000:]
        if code == 75:
            newest = max(path.name for path in run_dir.glob("checkpoints/stage*/step-*"))
            assert newest == f"step-{last_step(run_dir) + 1:08d}", "a step was trained and is not kept"
    assert submit(tiny, run_dir, log).wait(700) == 0, log.read_text()[-4000:]
    same(run_dir, straight)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["rows_repeated"] == summary["rows_skipped"] == summary["steps_skipped"] == 0
    assert summary["rows_dropped_tail"] == 3 * 11
    assert summary["steps_replayed"] == sum(r["steps_replayed"] for r in tiny.recoveries(run_dir)) <= 9
    assert len(summary["recoveries_s"]) == len(signals)
    assert all(0 < seconds < 700 for seconds in summary["recoveries_s"])
    assert "ended by SIGTERM" not in log.read_text()
    assert "--run.resume auto goes on" in log.read_text()
    # Another command does not.
    other = submit(tiny, run_dir, log, "--run.resume=false")
    assert other.wait(300) == 2
    assert "holds a run already" in log.read_text()
