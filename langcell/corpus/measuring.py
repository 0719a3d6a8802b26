"""Lengths and totals of cells, where obs does not tell them: Census releases before 2023-12-15.

Slices are cut by non-zeros and counts are divided by totals, so both are measured first: one pass over X
that adds up and keeps nothing, in tasks of 16 bands (what they hold does not grow with a cell's genes). A
release holds all genes measured, so the sum of a row is its total. The result is not kept: it is a quarter
of the whole work, once.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
import ray.data

from langcell.census.datasource import SliceSource
from langcell.census.experiment import ExperimentReader
from langcell.census.opening import reason_of
from langcell.census.reading import MAY_PASS, patiently
from langcell.census.slices import BAND, Slice, make_slices
from langcell.corpus.tasks import graph
from langcell.errors import InputError

CELLS_A_TASK = 16 * BAND
ASSUMED_NNZ = 2_000
"""Non-zeros of a cell that a plan assumes where none is told; the mean of a release is below (1,700)."""


def measure(reader: ExperimentReader, attempts: int, obs: pa.Table) -> pa.Table:
    """`obs` with nnz and raw_sum as X has them. The process must be connected to Ray."""
    cells = obs.select(["soma_joinid"]).append_column("nnz", pa.array(np.ones(len(obs), np.int64)))
    slices = make_slices(cells, CELLS_A_TASK)
    block_of = partial(_measure_block, reader, attempts)
    source = SliceSource(block_of, slices, lambda part: 24 * len(part.cells))
    with graph() as retries:
        blocks = ray.data.read_datasource(
            source, override_num_blocks=len(slices), ray_remote_args=retries
        ).iter_batches(batch_size=None, batch_format="pyarrow")
        measured = pa.concat_tables(blocks).sort_by("soma_joinid")
    return _with(obs, measured["nnz"], measured["raw_sum"])


def assume(obs: pa.Table) -> pa.Table:
    """`obs` with an assumed nnz for all cells, for a plan, which reads no count."""
    n = len(obs)
    return _with(obs, pa.array(np.full(n, ASSUMED_NNZ, np.int64)), pa.array(np.full(n, np.nan)))


def _measure_block(reader: ExperimentReader, attempts: int, part: Slice) -> pa.Table:
    joinid = part.cells["soma_joinid"].to_numpy()
    try:
        nnz, raw_sum = patiently(attempts)(reader.measure, joinid)
    except MAY_PASS as error:
        raise InputError(
            f"census: the cells with soma_joinid {joinid[0]} to {joinid[-1]} cannot be measured: "
            f"{reason_of(error)}. A fragment is damaged, or storage does not answer; no slice can be cut "
            "without their lengths. Mend it, or leave them out by census.filter."
        ) from error
    return pa.table({"soma_joinid": joinid, "nnz": nnz, "raw_sum": raw_sum})


def _with(obs: pa.Table, nnz: pa.Array, raw_sum: pa.Array) -> pa.Table:
    for name, column in (("nnz", nnz), ("raw_sum", raw_sum)):
        obs = obs.set_column(obs.column_names.index(name), name, column)
    return obs
