"""Three hosts, a worker on each of two, and their cables cut: one for 30 s, the other for ever."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.hosts import Resources, three_hosts
from tests.faults.making import HEALTH, Straight, Tiny, last_step

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HOSTS = (Resources(2), Resources(1, {"trainer": 1}), Resources(1, {"trainer": 1}))
OPTIONS = {
    "num_workers": 2,
    "min_workers": 1,
    "resize_s": 5.0,
    "cpus_per_worker": 0.5,
    "worker_resources": {"trainer": 1},
    "collective_timeout_s": 60.0,
    "max_failures": 5,
}


@pytest.mark.soak
def test_hosts_are_cut_off(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """One for 30 s: the other goes on with all lanes, and the one that comes back is given work again. Then
    the other for ever: the one that came back takes all of it. Same cells, losses to 1e-5."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "tests.faults.driver",
        str(run_dir),
        str(tiny.folder),
        json.dumps(OPTIONS),
    ]
    with three_hosts(HOSTS, environment={**HEALTH, "PYTHONPATH": str(ROOT)}) as net, log.open("wb") as said:
        job = net.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        wait_for_step(job, run_dir, 12, log)
        net.cut(2)
        time.sleep(30)
        net.mend(2)
        net.start_ray(2)
        net.wait_for_nodes(3)
        wait_for_step(job, run_dir, 40, log)
        before = len(tiny.recoveries(run_dir))
        net.cut(1)
        assert job.wait(900) == 0, log.read_text()[-6000:]
    tiny.assert_once(run_dir)
    assert tiny.seen(run_dir).equals(tiny.seen(straight.run_dir))
    for ours, theirs in zip(tiny.losses(run_dir), tiny.losses(straight.run_dir), strict=True):
        assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-5)
    assert len(tiny.recoveries(run_dir)) > before >= 1, "a cut was not noticed"


def wait_for_step(job: subprocess.Popen[bytes], run_dir: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while last_step(run_dir) < step:
        assert job.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.02)
