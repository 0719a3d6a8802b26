"""A node of a cluster is lost: its raylet is killed, and its workers with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.making import EPOCH, HEALTH, Straight, Tiny, same

ROOT = Path(__file__).parents[2]


def cluster_of_three(
    tiny: Tiny, run_dir: Path, step: int, how: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.raylets", str(run_dir), str(tiny.folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [*command, json.dumps({"cpus_per_worker": 0.5, **options}), str(step), how],
        cwd=ROOT,
        env=environment | HEALTH | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def lose_a_raylet(tiny: Tiny, run_dir: Path, step: int, *, how: str = "kill", **options: Any) -> str:
    done = cluster_of_three(tiny, run_dir, step, how, **options)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    assert "a raylet is killed" in done.stdout
    assert tiny.recoveries(run_dir)
    return said


@pytest.mark.slow
@pytest.mark.soak
def test_fewer_workers_go_on_until_a_node_comes_back(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """One worker a node: with one node left one worker takes all four lanes, and gives two of them back."""
    run_dir = tmp_path / "run"
    elastic = {"min_workers": 1, "resize_s": 1.0, "worker_resources": {"trainer": 2}, "checkpoint_steps": 0}
    said = lose_a_raylet(tiny, run_dir, 25, how="return", **elastic)
    sizes = re.findall(r"stage \d  workers: (\d)", said)
    assert sizes[-2:] == ["1", "2"], sizes
    lost, grown = tiny.recoveries(run_dir)
    assert lost["step"] == EPOCH, "nothing was saved before the node was lost"
    assert grown["steps_replayed"] <= 2 < grown["step"] - EPOCH, "it was not saved before it grew"
    tiny.assert_once(run_dir)
    assert tiny.seen(run_dir).equals(tiny.seen(straight.run_dir))
    for ours, theirs in zip(tiny.losses(run_dir), tiny.losses(straight.run_dir), strict=True):
        assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.soak
def test_another_head_goes_on(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """The head's node is lost, with the driver on it. The nodes that trained for it live on, and do not
    disturb the job that is submitted to another cluster at once. There the node under both workers is
    drained: a checkpoint is made, the only one before the stage's end, and they move to the other node. The
    same to the last bit."""
    run_dir, options = tmp_path / "run", {"worker_resources": {"trainer": 1}}
    lost = cluster_of_three(tiny, run_dir, 28, "head", **options)
    alive = re.search(r"alive: (\d+) (\d+)", lost.stdout)
    assert alive, lost.stdout[-4000:] + lost.stderr[-4000:]
    orphans = [psutil.Process(int(pid)) for pid in alive.groups()]
    try:
        assert all(orphan.is_running() for orphan in orphans)
        lose_a_raylet(tiny, run_dir, 50, how="drain", checkpoint_steps=0, **options)
    finally:
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
    same(run_dir, straight)
    first, second = tiny.recoveries(run_dir)
    assert 23 < first["step"] < 50
    assert second["step"] > 50, "nothing was saved when the node was to be taken away"
