"""Storage that is full or refuses: said clearly, nothing committed is lost, and what was seen is not
forgotten."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from langcell.bench.ranks import run_ranks
from langcell.errors import RunError
from langcell.storage import open_root
from tests.faults.making import Straight, Tiny, last_step, same, train, watched
from tests.s3server import CONTROL, ENVIRONMENT, Fault, s3_server

MIB = 1 << 20


class FullDisk:
    """A file system of a few MiB. place: its mount point."""

    def __init__(self, place: str) -> None:
        self.uri, self._ballast = place, Path(place) / "ballast"

    def spoil(self) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            for block in (MIB, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"0" * block)

    def mend(self) -> None:
        self._ballast.unlink()


class Refusing:
    """A bucket that takes nothing. url: of the server."""

    def __init__(self, url: str, uri: str) -> None:
        self.url, self.uri = url, uri

    def spoil(self) -> None:
        fault = Fault(methods=("PUT", "POST"), status=403)
        requests.put(self.url + CONTROL, json=asdict(fault)).raise_for_status()

    def mend(self) -> None:
        requests.delete(self.url + CONTROL).raise_for_status()


def saved(rank: int, storage: FullDisk | Refusing) -> dict[str, Any]:
    """A checkpoint, one that cannot be written, one again; then a storage that stays spoilt."""
    import torch.distributed as dist

    from langcell.objective.lanes import Lanes
    from langcell.train import liveness, saver, trace
    from langcell.train.store import Cursor, Store
    from tests.train.test_checkpoint import COUNT, LANES, engine_of, steps, toy

    os.environ |= ENVIRONMENT
    saver.time.sleep = lambda seconds, sleep=saver.time.sleep: sleep(min(seconds, 0.05))  # between tries
    device, lanes = torch.device("cpu"), Lanes.here(LANES)
    engine = engine_of("fp32", 2, lanes)
    root = open_root(storage.uri)
    store, seen = Store(root, 2), trace.Trace()
    saves = saver.Saver(
        store, liveness.clone(liveness.board()), seen, saver.Keep(5, False),
        token="aaaaaaaa", start=0, before_commit=lambda: None, alive=lambda: None,
    )  # fmt: skip

    def spoil(yes: bool) -> None:
        if rank == 0:
            storage.spoil() if yes else storage.mend()
        dist.barrier()

    def save(step: int, *, now: bool = False) -> bool:
        for done in range(step - 2, step):
            steps(engine, lanes, done, done + 1)
            seen.add(done, [toy.batch(lane * COUNT, COUNT) for lane in lanes.owned], None)
        what = (engine, Cursor(2, 0, step, step, "plan"), None)
        if now:
            return saves.save_now(device, *what, ends_epoch=False)
        saves.save(*what, ends_epoch=False)
        return saves.wait(device)

    told: dict[str, Any] = {"first": save(2)}
    spoil(True)
    told["spoilt"], told["why"] = save(4), list(saves.failures)
    told["left"] = [name for name, _ in store.committed()], store.names()
    spoil(False)
    told["mended"], told["then"] = save(6), list(saves.failures)
    told["files"] = [found[1:] for found in trace.files(root, 2)]
    told["audit"] = trace.audit(root, 2, first_step=0, steps=1, epochs=6, cells=LANES * COUNT)
    spoil(True)
    told["for ever"], told["hopeless"] = save(8, now=True), saves.hopeless
    spoil(False)
    told["stands"] = [name for name, _ in store.committed()]
    engine.destroy()
    return told


def check(ranks: list[dict[str, Any]], word: str) -> None:
    told = ranks[0]
    for other in ranks:  # all ranks agree on what happened
        assert (other["first"], other["spoilt"], other["mended"], other["for ever"]) == (
            True,
            False,
            True,
            False,
        )
    [why] = told["why"]
    assert word in why
    assert told["left"] == (["step-00000002"], ["step-00000002"]), "what was half-written is gone"
    assert told["then"] == []
    assert told["files"] == [(0, 2), (2, 6)], "what the checkpoint that failed had seen stands in the next"
    assert told["audit"] == (0, 0)
    assert told["hopeless"]
    assert told["stands"] == ["step-00000006", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A file system of one MiB, or as many as asked for, or a skip where none can be mounted."""
    place, size = tmp_path / "disk", getattr(request, "param", 1) * MIB
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "langcell-test", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield str(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full(small_disk: str) -> None:
    check(run_ranks(saved, 2, FullDisk(small_disk)), "No space left on device")


@pytest.mark.slow
def test_a_bucket_that_refuses() -> None:
    with s3_server() as server:
        server.client.create_bucket(Bucket="runs")
        check(run_ranks(saved, 2, Refusing(server.url, server.uri("runs/one"))), "rank 0: OSError: ")


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [200], indirect=True)
def test_a_run_ends_on_a_full_disk_and_goes_on(straight: Straight, tiny: Tiny, small_disk: str) -> None:
    """It says why after three checkpoints in vain; with room again it goes on from what was committed."""
    disk, run_dir = FullDisk(small_disk), Path(small_disk, "run")

    def fill(done: threading.Event) -> None:
        while last_step(run_dir) < 8 and not done.wait(0.01):
            pass
        disk.spoil()

    with watched(fill), pytest.raises(RunError, match=r"checkpoints cannot be written .* No space left"):
        train(tiny, run_dir)
    disk.mend()
    trained = train(tiny, run_dir)
    same(run_dir, straight, trained)
    [recovery] = tiny.recoveries(run_dir)
    assert recovery["step"] >= 4, "what was committed is lost"
