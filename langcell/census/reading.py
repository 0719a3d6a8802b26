"""One slice, read with patience and judged: what its counts are, and which cells have none.

Storage on a network fails now and then (timeouts, resets, a 500 of S3), and Ray's defaults are the wrong
way round: an exception is never retried, a worker that dies for ever. So a read is tried here
`census.attempts` times with growing, random waits, and whatever still fails is told as a fault of the
slice's cells, like counts that are no counts. What a task returns is so a pure function of its slice;
whether a fault ends the job is decided on the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tenacity
import tiledbsoma as soma

from langcell.cells.faults import Fault, find_faults
from langcell.census.opening import reason_of
from langcell.census.slices import RawCells, Reader, SentenceReader, Slice

MAY_PASS = (OSError, soma.SOMAError)
"""What a read may raise and, tried again, may not: a fault of storage. A damaged file always will."""


@dataclass(frozen=True)
class JudgedCells:
    """The cells of a slice, in its order: counts (float32 CSR [cells, genes]), totals (float64 [cells]),
    fault (uint8 [cells], a `Fault`; the counts of a cell with one mean nothing) and why a slice could not
    be read (empty if it was)."""

    counts: sp.csr_matrix
    totals: np.ndarray
    fault: np.ndarray
    reason: str

    @property
    def sound(self) -> tuple[sp.csr_matrix, np.ndarray]:
        """Counts and totals of the cells without a fault."""
        if not self.fault.any():
            return self.counts, self.totals
        rows = self.fault == Fault.NONE
        return self.counts[rows], self.totals[rows]


def read_cells(reader: Reader, part: Slice, attempts: int) -> JudgedCells:
    """Read a slice, `attempts` times if need be, and judge its cells."""
    n_cells = len(part.cells)
    try:
        raw: RawCells = patiently(attempts)(reader, part)
    except MAY_PASS as error:
        nothing = sp.csr_matrix((n_cells, 1), dtype=np.float32)
        fault = np.full(n_cells, Fault.UNREADABLE, np.uint8)
        return JudgedCells(nothing, np.zeros(n_cells), fault, reason_of(error))
    fault = np.where(raw.fits, find_faults(raw.counts, raw.totals), np.uint8(Fault.MISFIT))
    return JudgedCells(raw.counts, raw.totals, fault, "")


def patiently(attempts: int) -> tenacity.Retrying:
    """Calls a function again when storage fails: after up to 1, 2, 4, ... 60 s, at random."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=1, max=60),
        retry=tenacity.retry_if_exception_type(MAY_PASS),
        reraise=True,
    )


def counts_block(reader: Reader, attempts: int, part: Slice) -> pa.Table:
    """The judged cells of a slice as an Arrow block, one row a cell.

    The columns of `Slice.cells` with the totals as raw_sum, then `slice` (int32), `fault` (uint8),
    `reason` (dictionary of strings), `gene` (list<int32>, columns of var) and `count` (list<float32>).
    """
    cells = read_cells(reader, part, attempts)
    offsets = pa.array(cells.counts.indptr.astype(np.int32, copy=False))
    at = part.cells.column_names.index("raw_sum")
    return _judged(
        part.cells.set_column(at, "raw_sum", pa.array(cells.totals)),
        part.index,
        cells.fault,
        cells.reason,
        {
            "gene": pa.ListArray.from_arrays(offsets, pa.array(cells.counts.indices)),
            "count": pa.ListArray.from_arrays(offsets, pa.array(cells.counts.data)),
        },
    )


def counts_bytes(part: Slice) -> int:
    """Bytes of a slice's `counts_block`, known before it is read: cells, then slice, fault, reason and two
    offsets a cell, gene and count a non-zero."""
    return part.cells.nbytes + 14 * len(part.cells) + 8 * part.nnz


def counts_of(table: pa.Table, n_vars: int) -> sp.csr_matrix:
    """Counts of a `counts_block`, or of any rows of one: float32 CSR [rows, n_vars]."""
    gene, count = (_in_one_piece(table[name]) for name in ("gene", "count"))
    offsets = gene.offsets.to_numpy()
    return sp.csr_matrix(
        (count.flatten().to_numpy(), gene.flatten().to_numpy(), offsets - offsets[0]), (len(table), n_vars)
    )


def _in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array; `combine_chunks` copies even what is in one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def sentences_block(reader: SentenceReader, attempts: int, part: Slice) -> pa.Table:
    """The sentences of a slice as an Arrow block, one row a cell.

    The columns of `Slice.cells`, then `slice` (int32), `fault` (uint8), `reason` (dictionary of strings)
    and `tokens` (list<uint16>).
    """
    reason = ""
    n = len(part.cells)
    try:
        read = patiently(attempts)(reader, part)
        offsets, tokens = read.offsets, read.tokens
        fault = np.where(read.fits, np.uint8(Fault.NONE), np.uint8(Fault.NO_TOKEN))
    except MAY_PASS as error:
        offsets, tokens = np.zeros(n + 1, np.int64), np.empty(0, np.uint16)
        fault, reason = np.full(n, Fault.UNREADABLE, np.uint8), reason_of(error)
    sentences = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
    return _judged(part.cells, part.index, fault, reason, {"tokens": sentences})


def sentences_bytes(part: Slice) -> int:
    """Bytes of a slice's `sentences_block`, known before it is read."""
    return part.cells.nbytes + 10 * len(part.cells) + 2 * part.nnz


def _judged(
    cells: pa.Table, index: int, fault: np.ndarray, reason: str, columns: dict[str, pa.Array]
) -> pa.Table:
    """Cells of a slice with what is known of each and what they hold."""
    n = len(cells)
    known = {
        "slice": pa.array(np.full(n, index, np.int32)),
        "fault": pa.array(fault),
        "reason": pa.DictionaryArray.from_arrays(np.zeros(n, np.int8), [reason]),
    }
    for name, column in (known | columns).items():
        cells = cells.append_column(name, column)
    return cells
