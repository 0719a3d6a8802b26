"""Whatever is killed, and when: the losses are those of the undisturbed run to the last bit, each cell
once."""

from __future__ import annotations

import contextlib
import random
import re
import threading
from pathlib import Path

import psutil
import pytest
import ray

from tests.faults.making import EPOCH, STEPS, Straight, Tiny, last_step, same, train, watched

pytestmark = pytest.mark.slow


def workers() -> list[psutil.Process]:
    """The training workers of this test's Ray."""
    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    found = []
    for process in psutil.Process(raylet.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_one(draw: random.Random) -> bool:
    found = workers()
    if found:
        draw.choice(found).kill()
    return bool(found)


def is_written(run_dir: Path) -> bool:
    """Whether a checkpoint's folder stands without its record."""
    folders = run_dir.glob("checkpoints/stage*/step-*")
    return any(not (folder / "checkpoint.json").exists() for folder in folders)


@pytest.mark.parametrize(
    ("drawn", "boundaries", "writing"),
    [
        (1, {EPOCH - 1}, {50}),
        pytest.param(6, {EPOCH - 1, 2 * EPOCH - 1}, {10, 50}, marks=pytest.mark.soak),
    ],
    ids=["thrice", "ten times"],
)
def test_killed_workers_change_no_number(
    straight: Straight, tiny: Tiny, tmp_path: Path, drawn: int, boundaries: set[int], writing: set[int]
) -> None:
    """SIGKILL of a worker at three steps of 69, or at ten: drawn ones, the last of an epoch, the last of
    stage 1, and when a checkpoint is being written, which is not taken for one."""
    draw, run_dir = random.Random(6), tmp_path / "run"
    others = [step for step in range(2, STEPS - 2) if step not in boundaries | writing]
    at = sorted({*draw.sample(others, drawn), *boundaries, *writing})
    left = list(at)

    def kill(done: threading.Event) -> None:
        while left and not done.wait(0.0005 if left[0] in writing else 0.005):
            due = last_step(run_dir) >= left[0] and (left[0] not in writing or is_written(run_dir))
            if due and kill_one(draw):
                del left[0]
                done.wait(3)  # the group is taken down

    with watched(kill):
        trained = train(tiny, run_dir, max_failures=len(at) + 2)
    assert not left, "a kill did not happen"
    same(run_dir, straight, trained)
    recoveries = tiny.recoveries(run_dir)
    assert len(recoveries) >= len(at) - 3  # one at a stage's end finds it finished; two may be one
    replayed = sum(recovery["steps_replayed"] for recovery in recoveries)
    assert 0 < replayed <= 9 * len(at), "more than what lies between two checkpoints"


def test_the_undisturbed_run_sees_each_cell_once(straight: Straight, tiny: Tiny) -> None:
    tiny.assert_once(straight.run_dir)
    assert tiny.recoveries(straight.run_dir) == []
    rows = tiny.seen(straight.run_dir)
    in_stage_2 = rows.filter(rows["step"].to_numpy() >= EPOCH)
    assert rows["hard_text_row"].null_count < len(rows)
    assert rows.slice(0, len(rows) - len(in_stage_2))["hard_text_row"].null_count == EPOCH * 16


def test_a_stopped_worker_is_named_and_replaced(straight: Straight, tiny: Tiny, tmp_path: Path) -> None:
    """SIGSTOP: nobody dies, the others hang in a collective. After the time-out they say whom they wait
    for."""
    run_dir, stopped = tmp_path / "run", []

    def stop(done: threading.Event) -> None:
        while not stopped and not done.wait(0.01):
            if last_step(run_dir) >= 10 and len(found := workers()) == 2:
                found[1].suspend()
                stopped.append(found[1])

    with watched(stop):
        trained = train(tiny, run_dir, collective_timeout_s=10.0)
    assert stopped
    same(run_dir, straight, trained)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    # Of workers long gone Ray keeps the logs in a folder `old`.
    said = "".join(log.read_text(errors="replace") for log in logs.rglob("worker-*.err"))
    # Rank 0 hears the others' pulse, and names the one that has none; what is heard of rank 0 is its store.
    assert re.search(
        r"rank (\d): no progress for 10 s .*: (rank (?!\1)\d gives no sign of life: .* of step \d+, on"
        r"|rank 0 is behind or cut off)",
        said,
    ), [line for line in said.splitlines() if "rank" in line]
