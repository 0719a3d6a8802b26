"""The trace of cells: what a checkpoint has seen, no more, and whether each was seen once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from langcell.storage import open_root
from langcell.train import trace
from tests.objective import toy


def rows(step: int, cells: list[int]) -> pa.Table:
    columns = [[step] * len(cells), cells, [0] * len(cells), [None] * len(cells)]
    return pa.table([pa.array(c) for c in columns], names=trace.SCHEMA.names).cast(trace.SCHEMA)


def test_rows_tell_cells_texts_and_draws() -> None:
    first, second = toy.batch(0, 3), toy.batch(3, 3)
    joinid = torch.cat([first.soma_joinid_B, second.soma_joinid_B])
    drawn = torch.tensor([[int(joinid[4]), 6], [int(joinid[1]), -1], [int(joinid[0]), 2]])
    table = trace.rows_of(7, [first, second], drawn)
    assert table.schema == trace.SCHEMA
    assert set(table["step"].to_pylist()) == {7}
    assert table["soma_joinid"].to_pylist() == joinid.tolist()
    assert table["text_row"].to_pylist() == [*first.text_row_B.tolist(), *second.text_row_B.tolist()]
    assert table["hard_text_row"].to_pylist() == [2, None, None, None, 6, None]
    assert trace.rows_of(7, [first], None)["hard_text_row"].null_count == 3


def test_what_lies_behind_the_cursor_is_cut_off(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        parts = [
            trace.encode([rows(step, [10 * step + rank]) for step in range(start, stop)]) for rank in (0, 1)
        ]
        trace.write(root, 1, start, stop, parts)
    assert [found[1:] for found in trace.files(root, 1)] == [(0, 4), (4, 8), (8, 9)]
    assert list(trace.files(root, 2)) == []
    trace.cut_back(root, 1, 8)
    assert [found[1:] for found in trace.files(root, 1)] == [(0, 4), (4, 8)]
    trace.cut_back(root, 1, 0)
    assert list(trace.files(root, 1)) == []


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([[1, 2, 3, 4], [4, 3, 2, 1]], (0, 0)),
        ([[1, 2, 3, 3], [4, 3, 2, 1]], (1, 1)),  # one twice, so another not at all
        ([[1, 2, 3, 4], []], (0, 4)),
        ([[1, 2, 3, 4, 5, 1], [1, 2, 3, 4]], (1, -1)),  # one of no epoch's plan shows as well
    ],
)
def test_repeated_and_skipped_cells_are_counted(
    tmp_path: Path, epochs: list[list[int]], expected: tuple[int, int]
) -> None:
    """Two steps of two cells an epoch, in files that do not end where epochs do."""
    root = open_root(str(tmp_path))
    steps = [half for epoch in epochs for half in np.array_split(epoch, 2)]
    tables = [rows(10 + step, cells.astype(int).tolist()) for step, cells in enumerate(steps)]
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        trace.write(root, 1, 10 + start, 10 + stop, [trace.encode(tables[start:stop])])
    assert trace.audit(root, 1, first_step=10, steps=2, epochs=2, cells=4) == expected
