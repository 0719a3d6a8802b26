"""Opening a Census, by version, by URI or the embedded one, and saying what is wrong when it fails.

TileDB's settings are measured on one core over a Census-shaped X of 85M non-zeros: buffers of 4 MiB and a
budget of 64 MiB instead of the 1 GiB defaults read twice the cells/s at a lower peak, about the rate of
decompression alone; of a larger budget (256 MiB) more time goes into page faults than it saves. TileDB would
hand freed memory back to the system after every query (`malloc_trim`) and take it anew, page by page: without
that a read by slices costs 1.0 CPU s instead of 1.4 per 85M non-zeros, as little as one long read. One thread
for local files, since Ray runs a process per core; on S3 TileDB keeps its threads for I/O, which only wait.

On S3 TileDB itself tries a request six times: with 100 ms doubling between them a SlowDown gets 3 s of
waits, a server that hangs is left after 3 s, one that answers nothing but errors is given up after 21 s.
(More tries double the wait without a cap: ten take 51 s. A longer outage is for `census.attempts`.)
Requests are signed with the credentials of the environment, if there are any: cellxgene_census would send
them unsigned to a private bucket too.

Handles belong to the process that opened them (TileDB's threads do not survive a fork), and a child
handle is closed with its parent, so whoever reads X holds the collection.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import cellxgene_census
import tiledbsoma as soma

from langcell.census.demo import build_demo
from langcell.census.options import CensusOptions
from langcell.errors import InputError, refuse_secrets

SECRETS = ("key", "key_id", "token", "password", "secret")
"""How TileDB's settings end that are secrets."""


def resolve(options: CensusOptions) -> CensusOptions:
    """The same with absolute paths: a task runs in another folder than its driver.

    Raises InputError for a secret among the options, which are stored and printed.
    """
    refuse_secrets("census.uri", options.uri or "")
    if secret := [name for name in options.tiledb if name.endswith(SECRETS)]:
        raise InputError(
            f"census.tiledb: {', '.join(secret)} must not stand among the options, which are stored. Give "
            "credentials by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
        )

    def found(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))

    return replace(
        options,
        uri="demo" if options.uri == "demo" else found(options.uri),
        obs_map=found(options.obs_map),
        symbols=found(options.symbols),
        dir=os.path.abspath(options.dir),
    )


def open_collection(options: CensusOptions) -> soma.Collection:
    """The collection that the (resolved) options name. Raises InputError where there is none."""
    try:
        return _open(options)
    except (soma.SOMAError, ValueError, OSError) as error:
        if options.uri is None:
            advice = (
                f"census.version {options.version!r} cannot be opened: {reason_of(error)}. Give the date "
                "of a release, `stable` or `latest`, and a network that reaches it, or a copy with census.uri"
            )
        else:
            advice = (
                f"census.uri {options.uri}: no SOMA collection can be opened there: {reason_of(error)}. Give "
                "the folder or URI of a Census, a folder of .h5ad files, or `demo` for the embedded cells"
            )
        raise InputError(advice) from error


def _open(options: CensusOptions) -> soma.Collection:
    if options.uri is None:
        return cellxgene_census.open_soma(census_version=options.version, tiledb_config=_settings(options))
    uri = _build_demo(options) if options.uri == "demo" else options.uri
    return cellxgene_census.open_soma(uri=uri, tiledb_config=_settings(options))


def _build_demo(options: CensusOptions) -> str:
    """URI of the embedded Census, built on every node that reads it, so that no shared disk is needed."""
    return build_demo(os.path.join(options.dir, "pbmc68k_reduced"))


def _settings(options: CensusOptions) -> dict[str, str | int]:
    """TileDB's settings for the place that the options name."""
    settings: dict[str, str | int] = {
        "soma.init_buffer_bytes": 4 << 20,
        "sm.mem.total_budget": 64 << 20,
        "sm.mem.malloc_trim": "false",
        "sm.compute_concurrency_level": 1,
        "vfs.s3.connect_timeout_ms": 3000,
        "vfs.s3.request_timeout_ms": 3000,
        "vfs.s3.connect_max_tries": 5,
        "vfs.s3.connect_scale_factor": 100,
    }
    if options.uri is not None:
        settings["vfs.s3.no_sign_request"] = "false"
        if "://" not in options.uri or options.uri.startswith("file:"):
            settings["sm.io_concurrency_level"] = 1
    return settings | options.tiledb


def experiment_of(collection: soma.Collection, options: CensusOptions) -> soma.Experiment:
    """The organism's experiment. Raises InputError for another layout or an unknown organism."""
    try:
        collection["census_info"]["summary"]
        organisms = collection["census_data"]
        if options.organism not in organisms:
            raise InputError(
                f"census.organism {options.organism!r} is not in {collection.uri}. "
                f"It holds: {', '.join(sorted(organisms))}"
            )
        experiment = organisms[options.organism]
        experiment.obs, experiment.ms["RNA"].var, experiment.ms["RNA"].X["raw"]
    except (KeyError, AttributeError) as error:
        raise InputError(
            f"{collection.uri} is not a Census: it has no {reason_of(error)}. The layout is "
            "census_info/summary and census_data/<organism>/{obs, ms/RNA/{var, X/raw}}"
        ) from error
    return experiment


@contextmanager
def reading_x(options: CensusOptions, x_uri: str) -> Iterator[soma.SparseNDArray]:
    """X/raw at `x_uri`, open in this process until the block ends. Raises SOMAError where storage does not
    answer. (By its own URI: 10 requests of S3, where the way through the collection takes 96.)"""
    if options.uri == "demo":
        _build_demo(options)
    context = cellxgene_census.get_default_soma_context(tiledb_config=_settings(options))
    with soma.SparseNDArray.open(x_uri, context=context) as x_raw:
        yield x_raw


@contextmanager
def told_plainly(uri: str) -> Iterator[None]:
    """Raises InputError for what storage raises in the block."""
    try:
        yield
    except soma.SOMAError as error:
        raise InputError(
            f"census.uri {uri}: storage does not answer or is damaged: {reason_of(error)}. Try again later, "
            "or copy the Census again."
        ) from error


def reason_of(error: Exception) -> str:
    """What of a library's message says what is wrong: without headers of requests, in one line."""
    text = " ".join(str(error).split()).partition(" [Remote IP")[0].strip("'\"")
    return text or type(error).__name__
