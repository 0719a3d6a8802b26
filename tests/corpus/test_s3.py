"""A corpus in a bucket: made from S3 to S3 through failing requests, it is the local one, file by file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from langcell.storage import open_root, read_file, sizes, write_file
from tests.s3server import ENVIRONMENT, SECRET, Fault, S3Server, s3_server

ROOT = Path(__file__).parents[2]
WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture(scope="module")
def server(demo_uri: str) -> Iterator[S3Server]:
    """Buckets `cells`, with the embedded Census under `census`, and `corpora`, which is empty."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for bucket in ("cells", "corpora"):
            server.client.create_bucket(Bucket=bucket)
        server.upload(demo_uri, "cells", "census")
        yield server


def run_prepare(census_uri: str, corpus_dir: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The job with the demo's options and five slices, in a process and a Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "--run.ray_address", "local"]
    command += ["--census.uri", census_uri, "--census.slice_nnz", "40000", "--corpus.dir", corpus_dir, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def tiledb_of(server: S3Server) -> tuple[str, str]:
    return "--census.tiledb", json.dumps(server.tiledb)


def content_of(manifest: Manifest) -> dict[str, object]:
    """What the corpus holds, whatever it was made from: hashes and counts."""
    return {
        "blocks": manifest.blocks,
        "files": {file.file: file.hash for file in manifest.files if file.file != "beta.parquet"},
        "beta": manifest.beta_hash,  # beta.parquet names its Census
        "counts": manifest.counts,
        "coverage": manifest.coverage,
    }


def names_of_secrets(files: dict[str, bytes]) -> list[str]:
    """Files in which the secret key or the name of its owner stands."""
    words = [SECRET.encode(), ENVIRONMENT["AWS_ACCESS_KEY_ID"].encode()]
    return [name for name, content in files.items() if any(word in content for word in words)]


@pytest.mark.slow
def test_from_bucket_to_bucket_through_failing_requests(server: S3Server, demo_uri: str, tmp_path: Path):
    local = run_prepare(demo_uri, str(tmp_path / "corpus"))
    assert local.returncode == 0, local.stderr
    expected = Manifest.read(str(tmp_path / "corpus"))

    uri = server.uri("corpora/whole")
    with server.fault(Fault(methods=("GET", "HEAD", *WRITES), status=500, every=7)) as hits:
        first = run_prepare("s3://cells/census", uri, *tiledb_of(server))
        assert first.returncode == 0, first.stderr
        assert hits() > 50
    made = Manifest.read(uri)
    assert content_of(made) == content_of(expected)
    # Nothing is left over: neither state nor a temporary file nor an unfinished upload.
    keys = {key.removeprefix("whole/") for key in server.keys("corpora", "whole/") if not key.endswith("/")}
    files = {file.file for file in [*made.blocks, *made.files]}
    assert keys == files | {"manifest.json", "summary.json"}
    assert "Uploads" not in server.client.list_multipart_uploads(Bucket="corpora")

    with server.fault(Fault(methods=WRITES, path="/blocks/")) as writes:
        again = run_prepare("s3://cells/census", uri, *tiledb_of(server))
        assert again.returncode == 0, again.stderr
        assert writes() == 0
    assert "5 of 5 slices were there already" in again.stdout

    told = {"stdout": first.stdout + again.stdout, "stderr": first.stderr + again.stderr}
    stored = {key: server.get("corpora", key) for key in server.keys("corpora")}
    assert names_of_secrets({name: text.encode() for name, text in told.items()} | stored) == []


@pytest.mark.slow
def test_counts_that_storage_never_gives_end_the_job_in_time(server: S3Server):
    """obs can be read, counts cannot: a message with the cells and what storage said, not a traceback."""
    with server.fault(Fault(path=r"/X/raw/.*/a0\.tdb$", status=500)):
        started = time.monotonic()
        job = run_prepare(
            "s3://cells/census", server.uri("corpora/never"), *tiledb_of(server), "--census.attempts", "2"
        )
        assert time.monotonic() - started < 120
    assert job.returncode == 2, job.stderr
    assert "10x_pbmc68k_reduced" in job.stderr  # the dataset
    assert "500" in job.stderr
    assert "Traceback" not in job.stderr
    assert "manifest.json" not in {key.rpartition("/")[2] for key in server.keys("corpora", "never/")}


@pytest.fixture
def root(server: S3Server) -> fs.FileSystem:
    root = open_root(server.uri("corpora/files"))
    root.create_dir("blocks/train", recursive=True)
    return root


@pytest.mark.parametrize("size", [0, 1_000, 12_000_000])
def test_files_go_through_failing_requests(server: S3Server, root: fs.FileSystem, size: int):
    name, content = "blocks/train/slice.parquet", os.urandom(size)
    with server.fault(Fault(methods=("GET", "HEAD", *WRITES), status=503, every=3)) as hits:
        write_file(root, name, b"another")
        write_file(root, name, content)
        assert read_file(root, name) == content
        assert sizes(root, [name, "blocks/train/none"]) == [size, None]
        found = root.get_file_info(fs.FileSelector("blocks", recursive=True))
        assert [info.path for info in found if info.type == fs.FileType.File] == [name]
        root.delete_dir("blocks")
        assert hits() > 2
    assert sizes(root, [name]) == [None]


@pytest.mark.slow
def test_a_write_that_hangs_is_made_again(server: S3Server, root: fs.FileSystem):
    """A part that storage does not acknowledge is dropped after 9 s, and sent again."""
    with server.fault(Fault(methods=("PUT",), hang=120, times=1)) as hits:
        started = time.monotonic()
        write_file(root, "hung", b"content")
        assert 2.5 < time.monotonic() - started < 30
        assert hits() == 1
    assert read_file(root, "hung") == b"content"


@pytest.mark.parametrize("fails_at", [WRITES, ("POST",)], ids=["its first part", "its end"])
def test_half_a_file_is_never_seen(server: S3Server, root: fs.FileSystem, fails_at: tuple[str, ...]):
    """A refusal (403) is not repeated by the client: the write ends there, and its name stays free."""
    refusal = Fault(methods=fails_at, path="torn", status=403)
    if fails_at == ("POST",):  # the first POST begins the upload, the second would end it
        refusal = replace(refusal, every=2)
    with server.fault(refusal), pytest.raises(OSError, match="ACCESS_DENIED"):
        write_file(root, "torn", os.urandom(25_000_000))
    assert sizes(root, ["torn"]) == [None]
    assert [key for key in server.keys("corpora", "files/torn") if not key.endswith(".tmp")] == []


def test_a_bucket_that_is_not_there_or_not_ours_is_told_as_a_mistake(server, monkeypatch):
    with pytest.raises(InputError, match="holds no whole corpus"):
        Manifest.read(server.uri("nowhere/corpus"))
    server.put("corpora", "private/manifest.json", b"{}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="ACCESS_DENIED"):
        Manifest.read(server.uri("corpora/private"))


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://KEY:{SECRET}@bucket/corpus",
        f"s3://KEY:half/{SECRET}@bucket/corpus?region=us-east-1",
        f"s3://{SECRET}@bucket/corpus",
    ],
)
def test_a_uri_with_credentials_is_refused_and_not_repeated(uri: str):
    with pytest.raises(InputError, match="no credentials") as refused:
        open_root(uri)
    assert SECRET not in str(refused.value)
