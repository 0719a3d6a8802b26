"""What the pre-flight finds: every fault by its own row, and nothing where nothing is wrong."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from langcell.errors import RunError
from langcell.recipes import doctor
from tests.jobs.head import end, free_ports
from tests.recipes.making import ROOT, argv, config
from tests.s3server import ENVIRONMENT, Fault, s3_server

QUICK = {"train__cpus_per_worker": 0.5, "train__num_workers": 2}


def squeezed(text: str) -> str:
    """Without white space: a table breaks its lines anywhere."""
    return "".join(text.split())


def red(
    capsys: pytest.CaptureFixture[str], *arguments: object, nodes_s: float = 30, **changed: object
) -> str:
    """What a table with red rows says, squeezed."""
    asked = config(*arguments, **{**QUICK, **changed})  # type: ignore[arg-type]
    with pytest.raises(RunError, match="checks are red"):
        doctor.run(asked, nodes_s=nodes_s)
    return squeezed(capsys.readouterr().out)


def test_nothing_is_wrong(demo_uri: str, demo_corpus: Path, tmp_path: Path) -> None:
    rows = doctor.run(config(demo_uri, demo_corpus, run__dir=tmp_path / "run", **QUICK))
    states = {row["check"]: row["state"] for row in rows}
    assert states == {
        **dict.fromkeys(("software", "run.dir", "corpus.dir", "corpus", "weights", "workers"), "ok"),
        **dict.fromkeys(("memory", "network"), "ok"),
        "census": "?",
    }
    details = {row["check"]: row["detail"] for row in rows}
    assert details["corpus"].startswith("700 cells in 4 blocks")
    assert details["network"].startswith("gloo, all-reduce of 64 MiB: ")
    assert not [*tmp_path.glob("run/*"), *tmp_path.glob("run/.*")], "it left something behind"
    assert not (demo_corpus / ".doctor").exists()


def test_half_a_corpus_and_a_damaged_one(
    ray_session: None, demo_uri: str, demo_corpus: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(demo_corpus, half)
    (half / "manifest.json").unlink()
    corpus, census = doctor._corpus(config(demo_uri, half))
    assert (corpus.state, census.state) == ("red", "ok")
    assert corpus.detail.startswith("half-written")
    assert census.detail.endswith("700 cells match"), "the Census that it can be finished from"
    shutil.copy(demo_corpus / "manifest.json", half)
    block = next(half.glob("blocks/train/*.parquet"))
    block.write_bytes(block.read_bytes()[:-100])
    [damaged] = doctor._corpus(config(demo_uri, half))
    assert damaged.state == "red"
    assert "is damaged: blocks/train/" in damaged.detail
    nowhere = "s3://runs/corpus?endpoint_override=127.0.0.1:1&scheme=http"
    [unreachable] = doctor._corpus(config(demo_uri, nowhere))
    assert unreachable.state == "red"


def test_a_check_that_fails_loses_no_other(demo_uri: str, demo_corpus: Path) -> None:
    def broken(_: object) -> list[doctor.Row]:
        raise RuntimeError("out of order")

    [row] = doctor._rows_of(broken, config(demo_uri, demo_corpus))
    assert (row.check, row.state, row.detail) == ("broken", "red", "RuntimeError: out of order")


def test_what_is_missing_refused_or_too_small(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    with s3_server() as server:
        server.client.create_bucket(Bucket="runs")
        with server.fault(Fault(methods=("PUT", "POST"), status=403)):
            said = red(
                capsys,
                nowhere,
                "/proc/langcell/corpus",
                run__dir=server.uri("runs/one"),
                model__text_init=f"{nowhere}/bert",
                nodes_s=2,
                train__num_workers=64,
                train__global_batch=64 * 8,
                train__cpus_per_worker=1,
            )
    assert "runs/one" in said
    assert said.count("cannotbewrittento") == 2, "run.dir and corpus.dir"
    assert "noSOMAcollection" in said
    assert f"{nowhere}/bert" in said
    assert squeezed("no place in time for 64 workers of CPU 1; the cluster has CPU 4") in said


@pytest.mark.slow
def test_too_little_memory(
    demo_uri: str, demo_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {"train__micro_batch": 4096, "train__global_batch": 4096, "train__num_workers": 1}
    wide = {"model__cell_layers": 6, "model__cell_width": 256}
    said = red(capsys, demo_uri, demo_corpus, run__dir=tmp_path / "run", **large, **wide)
    assert squeezed("GB a worker is foretold, more than 80% of") in said


@pytest.fixture
def other_node(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A cluster whose second node has another release of transformers and another disk at one path: its
    address, and the path."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("another disk at one path can only be had by root")
    shadow, place = tmp_path / "shadow" / "transformers-9.9.9.dist-info", tmp_path / "shared"
    shadow.mkdir(parents=True)
    (shadow / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    place.mkdir()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False},
    )
    start = (
        f"{shlex.quote(str(Path(sys.executable).parent / 'ray'))} start --block --address={cluster.address}"
    )
    start += " --num-cpus=2 --object-store-memory=80000000 --node-ip-address=127.0.0.2"
    start += " --dashboard-agent-listen-port={} --dashboard-agent-grpc-port={}".format(*free_ports(2))
    script = f"mount -t tmpfs langcell-test {shlex.quote(str(place))} && exec {start}"
    environment = {**os.environ, "PYTHONPATH": str(shadow.parent), "RAY_TMPDIR": str(tmp_path)}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nothing to drain at the end
    node = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], env=environment)
    try:
        yield cluster.address, place
    finally:
        end(node)
        cluster.shutdown()


@pytest.mark.slow
def test_a_node_that_is_not_like_the_others(
    other_node: tuple[str, Path], demo_uri: str, demo_corpus: Path
) -> None:
    """The job itself, on a live cluster, while the other node joins."""
    address, place = other_node
    options = argv(demo_uri, demo_corpus, run__dir=place / "run", run__ray_address=address, **QUICK)
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), *options]
    deadline = time.monotonic() + 300
    while True:
        done = subprocess.run(
            command,
            env={**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        said = squeezed(done.stdout)
        if "127.0.0.2" in said or time.monotonic() > deadline:
            break
    assert "transformers9.9.9" in said, done.stdout + done.stderr
    assert "isanotherfolderhere" in said
    assert done.returncode == 1
    assert "checks are red" in done.stderr
