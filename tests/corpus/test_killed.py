"""Whatever dies while a corpus is prepared, the corpus that comes out is the same, each slice once."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from langcell.corpus.manifest import Manifest
from tests.corpus.making import make, read_blocks

pytestmark = pytest.mark.slow
SLICE_NNZ = 5_000  # 35 slices of the embedded cells

DRIVER = """
import sys
import ray
from tests.corpus.making import make
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
print("started", flush=True)
make(sys.argv[1], sys.argv[2], census__slice_nnz=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def whole(ray_session, demo_uri, tmp_path_factory) -> Path:
    """The corpus of a run that nothing disturbed."""
    dir = tmp_path_factory.mktemp("whole") / "corpus"
    make(demo_uri, dir, census__slice_nnz=SLICE_NNZ)
    return dir


def same(dir: Path, whole: Path) -> None:
    """Every file and count of two corpora is equal, and nothing else stands in the folder."""
    assert Manifest.read(str(dir)) == Manifest.read(str(whole))
    assert read_blocks(dir) == read_blocks(whole)
    names = [{str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()} for d in (dir, whole)]
    assert names[0] == names[1]


def kill_one(titles: tuple[str, ...], draw: random.Random) -> bool:
    """Kill a worker of this test's Ray in a task that is titled so; whether one was found.

    It is stopped first and looked at again: by then it may be at another task.
    """
    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    draw.shuffle(workers)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            if _title(worker).startswith(titles):
                worker.suspend()
                if _title(worker).startswith(titles):
                    worker.kill()
                    return True
                worker.resume()
    return False


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@pytest.mark.parametrize(
    "titles",
    [
        ("ray::histogram_of",),
        ("ray::collect_of",),
        ("ray::merge_parts",),
        ("ray::ReadSliceSource", "ray::Map"),
    ],
    ids=["histogram", "medians", "merge", "tokens"],
)
def test_workers_that_are_killed_cost_nothing_but_time(whole, demo_uri, tmp_path, titles) -> None:
    """Three at most, in every phase by itself: a task that is killed four times is given up."""
    draw, done, killed = random.Random(titles[0]), threading.Event(), []

    def kill() -> None:
        while not done.is_set() and len(killed) < 3:
            if kill_one(titles, draw):
                killed.append(titles)
                done.wait(draw.uniform(0.05, 0.5))
            done.wait(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        make(demo_uri, tmp_path / "corpus", census__slice_nnz=SLICE_NNZ)
    finally:
        done.set()
        thread.join()
    assert killed, "no task of this phase was met"
    same(tmp_path / "corpus", whole)


def test_a_driver_that_is_killed_goes_on_where_it_was(whole, demo_uri, tmp_path) -> None:
    draw, root, corpus = random.Random(2), Path(__file__).parents[2], tmp_path / "corpus"
    command = [sys.executable, "-c", DRIVER, demo_uri, str(corpus), str(SLICE_NNZ)]
    environment, said = {**os.environ, "PYTHONPATH": str(root)}, tmp_path / "stderr"

    def reports() -> int:
        return len(list((corpus / "unfinished").glob("slice-*.json")))

    # Killed while it computes beta, then twice among the tokens; the last run is left alone.
    for least in (0, draw.randint(1, 8), draw.randint(9, 25), None):
        before = reports()
        with said.open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=errors
            )
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        if least is None:
            assert process.wait(timeout=600) == 0, said.read_text()
            break
        while not (corpus / "unfinished" / "state.json").exists() or reports() < least:
            assert process.poll() is None, f"it ended before it could be killed: {said.read_text()}"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        time.sleep(1)  # its workers end with it
        assert not (corpus / "manifest.json").exists()
        assert reports() >= before, "a finished slice was thrown away"
    same(corpus, whole)
