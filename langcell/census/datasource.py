"""Slices as a Ray Data source: one read task, and one block, a slice.

Ray Data is told beforehand how many rows and bytes each block will have. What reads a block is put into
the object store once and looked up by the tasks: a task's own description is its cells (some 50 bytes each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from langcell.census.slices import Slice


class SliceSource(Datasource):
    """Ray Data source whose blocks are `block_of(slice)`, Arrow tables of one row per cell.

    block_of: picklable, however large; slices: one task each; bytes_of: bytes of a slice's block.
    """

    def __init__(
        self, block_of: Callable[[Slice], pa.Table], slices: list[Slice], bytes_of: Callable[[Slice], int]
    ) -> None:
        super().__init__()
        self._block_of, self.slices, self._bytes_of = ray.put(block_of), slices, bytes_of

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        return sum(map(self._bytes_of, self.slices))

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task per slice, whatever `parallelism`: a slice is the unit that is recomputed."""
        return [
            ReadTask(
                partial(_read, self._block_of, part),
                BlockMetadata(
                    num_rows=len(part.cells),
                    size_bytes=self._bytes_of(part),
                    exec_stats=None,
                    input_files=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for part in self.slices
        ]


def _read(block_of: ray.ObjectRef, part: Slice) -> Iterator[pa.Table]:
    yield ray.get(block_of)(part)
