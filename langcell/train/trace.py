"""Which cells a run has seen: a record by which "each once" is judged, not promised.

Each rank notes the cells of its lanes, with the text that each was read with and the hard text that was drawn
for it; with every checkpoint these notes become one file, written before the checkpoint exists:

    trace/stage2/00000092-00000120.parquet      steps [92, 120)

What was seen after the last checkpoint is in no file, and what a run goes back behind is cut off
(`cut_back`): so what stands in the folder is what the weights have seen. About 10 bytes a cell.

Shape suffixes: B cells of a lane, N cells that start pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from torch import Tensor

from langcell.batch import MicroBatch
from langcell.storage import write_file

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("soma_joinid", pa.int64()),
        ("text_row", pa.int32()),
        ("hard_text_row", pa.int32()),  # null: none was drawn for this cell
    ]
)
_NAME = re.compile(r"(\d+)-(\d+)\.parquet")


class Trace:
    """What this rank saw since the last checkpoint."""

    def __init__(self) -> None:
        self._rows: list[pa.Table] = []

    def add(self, step: int, batches: list[MicroBatch], drawn_N2: Tensor | None) -> None:
        """One step's micro-batches. drawn_N2: joinid and text row of each hard text that was drawn
        (int64)."""
        self._rows.append(rows_of(step, batches, drawn_N2))

    def take(self) -> list[pa.Table]:
        """All of it, which is then forgotten here."""
        taken, self._rows = self._rows, []
        return taken


def encode(rows: list[pa.Table]) -> bytes:
    """Rows as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *rows]), sink)
    return sink.getvalue().to_pybytes()


def write(root: fs.FileSystem, stage: int, start: int, stop: int, parts: list[bytes]) -> None:
    """Write what all ranks saw in the steps [start, stop), in parts as `encode` gives them. Raises
    OSError."""
    rows = pa.concat_tables([pq.read_table(pa.BufferReader(part)) for part in parts]).sort_by("step")
    root.create_dir(folder_of(stage), recursive=True)
    write_file(root, f"{folder_of(stage)}/{start:08d}-{stop:08d}.parquet", encode([rows]))


def rows_of(step: int, batches: list[MicroBatch], drawn_N2: Tensor | None) -> pa.Table:
    """A step's rows of a trace."""
    joinid = np.concatenate([batch.soma_joinid_B.cpu().numpy() for batch in batches])
    text_row = np.concatenate([batch.text_row_B.cpu().numpy() for batch in batches])
    hard = np.full(len(joinid), -1)
    if drawn_N2 is not None:
        drawn = drawn_N2.cpu().numpy()
        order = np.argsort(joinid)
        hard[order[np.searchsorted(joinid, drawn[:, 0], sorter=order)]] = drawn[:, 1]
    columns = [np.full(len(joinid), step), joinid, text_row, pa.array(hard, pa.int64(), mask=hard < 0)]
    return pa.table(columns, names=SCHEMA.names).cast(SCHEMA)


def folder_of(stage: int) -> str:
    """Where a stage's trace lies in the run directory."""
    return f"trace/stage{stage}"


def files(root: fs.FileSystem, stage: int) -> Iterator[tuple[str, int, int]]:
    """Path, first step and the step after the last of every file of a stage's trace, by first step."""
    found = root.get_file_info(fs.FileSelector(folder_of(stage), allow_not_found=True))
    for info in sorted(found, key=lambda info: info.path):
        if match := _NAME.fullmatch(info.base_name):
            yield info.path, int(match[1]), int(match[2])


def cut_back(root: fs.FileSystem, stage: int, first_step: int) -> None:
    """Remove what was seen from global step `first_step` on."""
    for path, _, stop in files(root, stage):
        if stop > first_step:
            root.delete_file(path)


def audit(
    root: fs.FileSystem, stage: int, first_step: int, steps: int, epochs: int, cells: int
) -> tuple[int, int]:
    """Cells that a stage saw more than once in an epoch, and those of an epoch that it did not see (rows).

    first_step: of the stage; steps: of an epoch; cells: of an epoch, its tail left out.
    """
    found = list(files(root, stage))
    repeated = skipped = 0
    for epoch in range(epochs):
        start = first_step + epoch * steps
        seen = [
            _joinids(root, path, start, start + steps)
            for path, a, b in found
            if a < start + steps and b > start
        ]
        joinid = np.concatenate([np.empty(0, np.int64), *seen])
        distinct = len(np.unique(joinid))
        repeated += len(joinid) - distinct
        skipped += cells - distinct
    return repeated, skipped


def _joinids(root: fs.FileSystem, path: str, start: int, stop: int) -> np.ndarray:
    where = [("step", ">=", start), ("step", "<", stop)]
    return pq.read_table(path, filesystem=root, columns=["soma_joinid"], filters=where)[
        "soma_joinid"
    ].to_numpy()
