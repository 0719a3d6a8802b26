"""Whatever dies while a corpus is prepared, the corpus that comes out is the same, each slice once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

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


def workers() -> list[psutil.Process]:
    """Ray workers of this session that run a task of `prepare`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith(("ray::histogram_of", "ray::collect_of", "ray::ReadSliceSource", "ray::Map")):
            found.append(process)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_that_are_killed_cost_nothing_but_time(whole, demo_uri, tmp_path, seed: int) -> None:
    draw, done, killed = random.Random(seed), threading.Event(), []

    def kill() -> None:
        while not done.wait(draw.uniform(0.05, 0.3)):
            running = workers()
            if running and len(killed) < 6:
                victim = draw.choice(running)
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL)
                    killed.append(victim.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        make(demo_uri, tmp_path / "corpus", census__slice_nnz=SLICE_NNZ)
    finally:
        done.set()
        thread.join()
    assert killed
    same(tmp_path / "corpus", whole)


@pytest.mark.parametrize("seed", [2, 3])
def test_a_driver_that_is_killed_goes_on_where_it_was(whole, demo_uri, tmp_path, seed: int) -> None:
    draw, root, corpus = random.Random(seed), Path(__file__).parents[2], tmp_path / "corpus"
    command = [sys.executable, "-c", DRIVER, demo_uri, str(corpus), str(SLICE_NNZ)]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def reports() -> int:
        return len(list((corpus / "unfinished").glob("slice-*.json")))

    # Killed while it computes beta, then twice among the tokens; the last run is left alone.
    for least in (0, draw.randint(1, 8), draw.randint(9, 25), None):
        before = reports()
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        if least is None:
            assert process.wait(timeout=600) == 0
            break
        while not (corpus / "unfinished" / "state.json").exists() or reports() < least:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        time.sleep(1)  # its workers end with it
        assert not (corpus / "manifest.json").exists()
        assert reports() >= before, "a finished slice was thrown away"
    same(corpus, whole)
