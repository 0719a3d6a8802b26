"""A Census in a bucket: read as the local one is, through failures of the storage, and given up in time.

TileDB repeats a request 5 times (500s, an answer cut short, 3 s of silence); what outlasts that, our own
attempts at a slice must bear. The bounds below are TileDB's settings with room for a busy machine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from langcell.cells.faults import Fault as CellFault
from langcell.census.options import CensusOptions
from langcell.census.reading import read_cells
from langcell.census.slices import Reader, Slice, make_slices
from langcell.census.source import open_source
from langcell.errors import InputError
from tests.s3server import ENVIRONMENT, Fault, S3Server, s3_server

COUNTS = r"/X/raw/.*/a0\.tdb$"  # the object with the counts
TRIES = 6  # requests that TileDB makes before it gives one up


@pytest.fixture(scope="module")
def server(demo_uri: str) -> Iterator[S3Server]:
    """A bucket `cells` with the embedded Census under `census`."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server.client.create_bucket(Bucket="cells")
        server.upload(demo_uri, "cells", "census")
        yield server


@pytest.fixture(scope="module")
def options(server: S3Server) -> CensusOptions:
    return CensusOptions(uri="s3://cells/census", tiledb=server.tiledb)


def slices_of(options: CensusOptions) -> tuple[Reader, list[Slice]]:
    source = open_source(options)
    reader, slices = source.reader, make_slices(source.obs(["cell_type"]), 50_000)
    source.close()
    return reader, slices


@pytest.fixture(scope="module")
def task(options: CensusOptions) -> tuple[Reader, Slice]:
    """What a task gets: the reader and the second of four slices."""
    reader, slices = slices_of(options)
    assert len(slices) == 4
    return reader, slices[1]


@pytest.fixture(scope="module")
def is_the_local_one(demo_uri: str) -> Callable[[tuple[Reader, Slice]], None]:
    """Reads the task's slice, twice at most, and asserts that it is what the local Census gives."""
    reader, slices = slices_of(CensusOptions(uri=demo_uri))
    local = reader(slices[1])
    assert local.fits.all()

    def check(task: tuple[Reader, Slice]) -> None:
        reader, part = task
        assert part.cells.equals(slices[1].cells)
        read = read_cells(reader, part, attempts=2)
        assert not read.fault.any(), read.reason
        assert (read.counts != local.counts).nnz == 0
        np.testing.assert_array_equal(read.totals, local.totals)

    return check


@pytest.mark.parametrize(
    "fault",
    [
        Fault(times=0),
        Fault(status=500, every=2),
        Fault(status=503, every=3),
        Fault(methods=("GET",), path=COUNTS, cut=True, times=2),
    ],
    ids=["none", "half of all 500", "a third 503", "cut short"],
)
def test_a_slice_is_read_through_failing_requests(server, task, is_the_local_one, fault):
    with server.fault(fault) as hits:
        is_the_local_one(task)
        assert fault.times == 0 or hits() > 1


@pytest.mark.slow
def test_obs_and_var_are_read_through_failing_requests(server, options, demo_uri):
    with server.fault(Fault(status=500, every=2)) as hits:
        source, local = open_source(options), open_source(CensusOptions(uri=demo_uri))
        assert source.obs(["cell_type"]).equals(local.obs(["cell_type"]))
        assert source.var().equals(local.var())
        assert hits() > 10
        source.close()
        local.close()


def test_a_read_that_hangs_is_dropped_and_made_again(server, task, is_the_local_one):
    """One request that is never answered costs its timeout of 3 s, not the minutes that it lasts."""
    with server.fault(Fault(path=COUNTS, hang=120, times=1)) as hits:
        started = time.monotonic()
        is_the_local_one(task)
        assert 2.5 < time.monotonic() - started < 10
        assert hits() == 1


def test_a_failure_that_outlasts_the_retries_of_a_request_costs_an_attempt_at_the_slice(
    server, task, is_the_local_one
):
    with server.fault(Fault(path=COUNTS, status=500, times=TRIES + 1)) as hits:
        is_the_local_one(task)
        assert hits() == TRIES + 1


def test_storage_that_fails_for_good_is_given_up_in_time(server, task):
    """Two attempts, each of one request with its repetitions and 3 s of waits, up to 1 s between them."""
    reader, part = task
    with server.fault(Fault(path="/X/raw/", status=500)) as hits:
        started = time.monotonic()
        read = read_cells(reader, part, attempts=2)
        assert time.monotonic() - started < 30
        assert 2 * TRIES <= hits() <= 4 * TRIES
    assert (read.fault == CellFault.UNREADABLE).all()
    assert "500" in read.reason


@pytest.mark.parametrize("path", ["", "/obs/", "/X/raw/"], ids=["everything", "obs", "X"])
def test_opening_storage_that_fails_for_good_says_so(server, options, path):
    started = time.monotonic()
    with (
        server.fault(Fault(path=path, status=500)),
        pytest.raises(InputError, match=r"census\.uri s3://cells/census\b.* 500"),
    ):
        open_source(options)
    assert time.monotonic() - started < 30


def test_a_bucket_that_is_not_there_or_not_ours_is_named(server, options, monkeypatch):
    with pytest.raises(InputError, match=r"census\.uri s3://cells/nowhere: no SOMA collection"):
        open_source(CensusOptions(uri="s3://cells/nowhere", tiledb=options.tiledb))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match=r"s3://cells/census: .*403"):
        open_source(options)


def test_a_fragment_that_is_cut_or_gone_is_noticed(server, task):
    """TileDB reads an X whose commit mark is lost as empty, without an error."""
    reader, part = task
    keys = server.keys("cells", "census")
    (counts,) = (key for key in keys if re.search(COUNTS, key))
    (mark,) = (key for key in keys if re.search(r"/X/raw/.*\.wrt$", key))
    whole = server.get("cells", counts)
    try:
        server.put("cells", counts, whole[: len(whole) // 2])
        read = read_cells(reader, part, attempts=1)
        assert (read.fault == CellFault.UNREADABLE).all()
        assert read.reason
    finally:
        server.put("cells", counts, whole)
    try:
        server.client.delete_object(Bucket="cells", Key=mark)
        assert (read_cells(reader, part, attempts=1).fault == CellFault.MISFIT).all()
    finally:
        server.put("cells", mark, b"")
