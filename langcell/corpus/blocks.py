"""Reading a corpus: its row groups as a plan takes them, and samples of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from langcell.corpus.manifest import Block, Manifest
from langcell.corpus.plan import RowGroups
from langcell.corpus.schema import BLOCK_SCHEMA
from langcell.storage import open_root


def row_groups(manifest: Manifest, split: str) -> tuple[RowGroups, ...]:
    """The row groups of each file of a split, in manifest order."""
    return tuple(RowGroups(block.file, tuple(block.row_groups)) for block in manifest.split(split))


def sample_cells(
    directory: str, manifest: Manifest, split: str, most: int, seed: int, columns: Sequence[str]
) -> pa.Table:
    """At most `most` cells of a split, a seeded sample in corpus order, read one file at a time."""
    blocks = manifest.split(split)
    ends = np.cumsum([block.rows for block in blocks])
    total = int(ends[-1]) if blocks else 0
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:most])
    schema = pa.schema([BLOCK_SCHEMA.field(name) for name in columns])
    root = open_root(directory)
    tables = []
    for block, end in zip(blocks, ends, strict=True):
        start = end - block.rows
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
        if len(rows):
            tables.append(_take(root, block, rows, columns))
    return pa.concat_tables([t.cast(schema) for t in tables]) if tables else schema.empty_table()


def _take(root: fs.FileSystem, block: Block, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Rows (ascending) of a block, of which only the row groups that hold some are read."""
    ends = np.cumsum(block.row_groups)
    group = np.searchsorted(ends, rows, side="right")
    needed = np.unique(group)
    size = np.diff(ends, prepend=0)
    first = np.cumsum(size[needed]) - size[needed]
    place = rows - (ends - size)[group] + first[np.searchsorted(needed, group)]
    with pq.ParquetFile(block.file, filesystem=root) as parquet:
        return parquet.read_row_groups(needed.tolist(), columns=list(columns)).take(place)
