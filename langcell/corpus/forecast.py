"""What preparing a corpus will take, from its draft alone: `jobs/prepare.py --plan`.

Memory is what a task may take at most; time is the CPU time of the measured rates below, all cores busy,
storage that keeps up. Rates: one core of an AMD EPYC, local disk with a warm cache, a generated Census
(1,670 non-zeros a cell); `python jobs/bench.py data` measures them anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from langcell.census.experiment import Census
from langcell.census.h5ad import H5adFolder
from langcell.census.slices import BAND
from langcell.corpus.draft import Draft, Order
from langcell.corpus.schema import TRAIN
from langcell.corpus.splits import count_splits

TASK_MB, TASK_BYTES_A_NONZERO = 400, 44
"""Peak memory of a task: a worker with its libraries and TileDB's buffers (10^6 bytes), and what grows with
the slice (bytes a non-zero). What is a worker's own: pages of the object store are the node's."""
READ_NNZ_S, BETA_NNZ_S, TOKEN_NNZ_S = 65e6, 36e6, 32e6
"""Non-zeros a second and core: read, and what a beta pass and the token pass do with them beyond that."""
X_BYTES, FILE_BYTES, TOKEN_BYTES, CELL_BYTES = 1.6, 8, 2.0, 12
"""On storage: bytes of a non-zero in X/raw and, without compression, in other files; of a token and of the
other columns of a cell in a block."""


@dataclass(frozen=True)
class Forecast:
    """lengths: as of `Draft`; cells, non-zeros (`nnz`) and texts; cells of each split; slices and their
    task's memory (MB); passes over X; bytes read from X and written; CPU seconds."""

    lengths: str
    cells: int
    nnz: int
    texts: int
    splits: dict[str, int]
    slices: int
    task_mb: int
    passes: int
    bytes_read: int
    bytes_written: int
    cpu_seconds: int

    def lines(self, cpus: int) -> str:
        """The plan in words; cpus: over how many the time is told."""
        splits = ", ".join(f"{name} {n:,}" for name, n in self.splits.items())
        wall = self.cpu_seconds / cpus
        return (
            f"cells      {self.cells:,} ({splits})\n"
            f"non-zeros  {self.nnz:,} ({self.nnz / self.cells:,.0f} a cell"
            f"{', ASSUMED: obs does not tell, X is measured first' if self.lengths == 'assumed' else ''})\n"
            f"texts      {self.texts:,}\n"
            f"slices     {self.slices:,}, {self.passes} passes over X\n"
            f"memory     {self.task_mb:,} MB a task at most; one task a CPU\n"
            f"bytes      {_size(self.bytes_read)} read, {_size(self.bytes_written)} written\n"
            f"time       {_time(self.cpu_seconds)} of CPU: about {_time(wall)} on {cpus} CPUs, if storage "
            "keeps up"
        )


def task_mb(nnz: int) -> int:
    """Most memory (MB) of a task whose slice holds `nnz` non-zeros."""
    return TASK_MB + round(TASK_BYTES_A_NONZERO * nnz / 1e6)


def forecast(order: Order, drafted: Draft) -> Forecast:
    """What the rest of `prepare` takes, nothing being there yet."""
    cells, split = drafted.cells, drafted.cells["split"].to_numpy()
    nnz = cells["nnz"].to_numpy()
    n_train = int(nnz[split == TRAIN].sum())
    beta_passes = 2 if not order.beta and isinstance(order.source, Census | H5adFolder) else 0
    measuring = int(drafted.lengths != "told")
    read = (nnz.sum() * (1 + measuring) + n_train * beta_passes) * _bands_read(order, cells)
    return Forecast(
        lengths=drafted.lengths,
        cells=len(cells),
        nnz=int(nnz.sum()),
        texts=len(drafted.texts),
        splits=count_splits(split),
        slices=len(drafted.slices),
        task_mb=task_mb(max((part.nnz for part in drafted.slices), default=0)),
        passes=1 + beta_passes + measuring,
        bytes_read=round(read * (X_BYTES if isinstance(order.source, Census) else FILE_BYTES)),
        bytes_written=round(
            TOKEN_BYTES * np.minimum(nnz + 1, order.tokens.max_length).sum() + CELL_BYTES * len(cells)
        ),
        cpu_seconds=round(read / READ_NNZ_S + nnz.sum() / TOKEN_NNZ_S + beta_passes * n_train / BETA_NNZ_S),
    )


def _bands_read(order: Order, cells: pa.Table) -> float:
    """Cells that are read for each one wanted: a Census is read by whole bands (at least 1)."""
    if not isinstance(order.source, Census):
        return 1.0
    bands = len(np.unique(cells["soma_joinid"].to_numpy() // BAND))
    return max(1.0, bands * BAND / len(cells) - BAND / len(cells))


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.0f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
