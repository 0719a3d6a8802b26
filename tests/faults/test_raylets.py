"""A node of a cluster is lost: its raylet is killed, and its workers with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.making import HEALTH, Straight, Tiny, same

ROOT = Path(__file__).parents[2]


def lose_a_raylet(tiny: Tiny, run_dir: Path, step: int, *, how: str = "kill", **options: Any) -> None:
    command = [sys.executable, "-m", "tests.faults.raylets", str(run_dir), str(tiny.folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*command, json.dumps({"cpus_per_worker": 0.5, **options}), str(step), how],
        cwd=ROOT,
        env=environment | HEALTH | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "a raylet is killed" in done.stdout
    assert tiny.recoveries(run_dir)


@pytest.mark.slow
def test_workers_move_to_another_node(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """Both workers stand on the node that is lost, and start again on the other: the same to the last bit."""
    lose_a_raylet(tiny, tmp_path / "run", 31, worker_resources={"trainer": 1})
    same(tmp_path / "run", straight)


@pytest.mark.slow
def test_fewer_workers_go_on(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """One worker a node: with one node left one worker takes all four lanes."""
    run_dir = tmp_path / "run"
    elastic = {"min_workers": 1, "resize_s": 1.0, "worker_resources": {"trainer": 2}}
    lose_a_raylet(tiny, run_dir, 10, **elastic)
    tiny.assert_once(run_dir)
    assert tiny.seen(run_dir).equals(tiny.seen(straight.run_dir))
    for ours, theirs in zip(tiny.losses(run_dir), tiny.losses(straight.run_dir), strict=True):
        assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-5)


@pytest.mark.slow
def test_a_node_that_is_drained_is_saved_from(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """The checkpoint that is made then is the only one before the epoch's end."""
    run_dir = tmp_path / "run"
    lose_a_raylet(tiny, run_dir, 25, how="drain", worker_resources={"trainer": 1}, checkpoint_steps=0)
    same(run_dir, straight)
    assert all(23 < recovery["step"] < 46 for recovery in tiny.recoveries(run_dir))
