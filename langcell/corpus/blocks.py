"""Reading a corpus: its row groups as a plan takes them, and samples of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from langcell.corpus.manifest import Manifest
from langcell.corpus.plan import RowGroup
from langcell.corpus.schema import BLOCK_SCHEMA
from langcell.storage import open_root


def row_groups(manifest: Manifest, split: str) -> tuple[RowGroup, ...]:
    """The row groups of a split, in manifest order."""
    return tuple(
        RowGroup(block.file, index, rows)
        for block in manifest.split(split)
        for index, rows in enumerate(block.row_groups)
    )


def sample_cells(
    directory: str, manifest: Manifest, split: str, most: int, seed: int, columns: Sequence[str]
) -> pa.Table:
    """At most `most` cells of a split, a seeded sample in corpus order, read one row group at a time."""
    groups = row_groups(manifest, split)
    ends = np.cumsum([group.rows for group in groups])
    total = int(ends[-1]) if groups else 0
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:most])
    schema = pa.schema([BLOCK_SCHEMA.field(name) for name in columns])
    root = open_root(directory)
    tables = []
    for group, end in zip(groups, ends, strict=True):
        start = end - group.rows
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
        if len(rows):
            with pq.ParquetFile(group.file, filesystem=root) as parquet:
                tables.append(parquet.read_row_group(group.index, columns=list(columns)).take(rows))
    return pa.concat_tables([t.cast(schema) for t in tables]) if tables else schema.empty_table()
