"""What preparing a corpus will take, from its draft alone: `jobs/prepare.py --plan`.

Memory is what a task may take at most; time is the CPU time of the measured rates below, all cores busy,
storage that keeps up. Rates: one core of an AMD EPYC, local disk with a warm cache, a generated Census
(1,670 non-zeros a cell); `python jobs/bench.py data` measures them anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from langcell.census.tokenised import TokenisedFolder
from langcell.corpus.draft import Draft, Order
from langcell.corpus.schema import SPLITS, TRAIN
from langcell.corpus.splits import count_splits

TASK_MB, TASK_BYTES_A_NONZERO = 420, 38
"""Peak resident memory of a task: a worker with its libraries and TileDB's buffers (MB), and what grows
with the slice (bytes a non-zero)."""
BETA_NNZ_S, TOKEN_NNZ_S = 14e6, 20e6
"""Non-zeros a second and core of one beta pass, and of the token pass."""
X_BYTES, TOKEN_BYTES, CELL_BYTES = 1.6, 1.84, 12
"""On storage: bytes of a non-zero in X/raw, of a token and of the other columns of a cell in a block."""


@dataclass(frozen=True)
class Forecast:
    """cells, non-zeros (`nnz`) and texts; cells of each split; slices and their task's memory (MB);
    passes over X; bytes read from X and written; CPU seconds."""

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
            f"non-zeros  {self.nnz:,} ({self.nnz / self.cells:,.0f} a cell)\n"
            f"texts      {self.texts:,}\n"
            f"slices     {self.slices:,}, {self.passes} passes over X\n"
            f"memory     {self.task_mb:,} MB a task at most; one task a CPU\n"
            f"bytes      {_size(self.bytes_read)} read, {_size(self.bytes_written)} written\n"
            f"time       {_time(self.cpu_seconds)} of CPU: about {_time(wall)} on {cpus} CPUs, if storage "
            "keeps up"
        )


def task_mb(nnz: int) -> int:
    """Most memory (MB) of a task whose slice holds `nnz` non-zeros."""
    return TASK_MB + round(TASK_BYTES_A_NONZERO * nnz / 2**20)


def forecast(order: Order, drafted: Draft) -> Forecast:
    """What the rest of `prepare` takes, nothing being there yet."""
    cells, split = drafted.cells, drafted.cells["split"].to_numpy()
    nnz = cells["nnz"].to_numpy()
    sentences = isinstance(order.source, TokenisedFolder)
    n_train = int(nnz[split == TRAIN].sum())
    tokens = int(np.minimum(nnz + 1, order.tokens.max_length).sum())
    beta_passes = 0 if sentences or order.beta else 2
    x_bytes = 2 if sentences else X_BYTES
    return Forecast(
        cells=len(cells),
        nnz=int(nnz.sum()),
        texts=len(drafted.texts),
        splits={name: n for name, n in count_splits(split).items() if name in SPLITS},
        slices=len(drafted.slices),
        task_mb=task_mb(max((part.nnz for part in drafted.slices), default=0)),
        passes=1 + beta_passes,
        bytes_read=round(x_bytes * (nnz.sum() + beta_passes * n_train)),
        bytes_written=round(TOKEN_BYTES * tokens + CELL_BYTES * len(cells)),
        cpu_seconds=round(nnz.sum() / TOKEN_NNZ_S + beta_passes * n_train / BETA_NNZ_S),
    )


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
