"""A slice comes in one piece; one that kills its worker is given up, one that storage loses tried again."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langcell.census.datasource import SliceSource
from langcell.census.experiment import Census
from langcell.census.options import CensusOptions
from langcell.census.reading import counts_block, counts_bytes
from langcell.census.slices import RawCells, Reader, Slice, make_slices
from langcell.corpus.schema import SPLITS
from langcell.corpus.token_pass import BlockWriter, Encoder, SliceReport, encode_block, write_tokens
from langcell.errors import InputError
from langcell.storage import open_root

N = 50


@pytest.fixture
def task(demo_uri: str, tmp_path: Path) -> tuple[Reader, list[Slice], Encoder, BlockWriter]:
    """Fifty cells of the embedded Census in five slices."""
    with Census.open(CensusOptions(uri=demo_uri)) as census:
        cells, n_vars, reader = census.obs([]).slice(0, N), len(census.var()), census.reader
    cells = cells.append_column("split", pa.array(np.zeros(N, np.int8)))
    cells = cells.append_column("text_id", pa.array(np.arange(N)))
    cells = cells.append_column("term", pa.array(["", *["CL:0000084"] * (N - 1)]).dictionary_encode())
    root = open_root(str(tmp_path))
    for folder in ("unfinished", *(f"blocks/{split}" for split in SPLITS)):
        root.create_dir(folder, recursive=True)
    tokens = np.arange(2, n_vars + 2).astype(np.uint16)
    slices = make_slices(cells, -(-sum(cells["nnz"].to_pylist()) // 4))
    assert len(slices) == 5
    return (
        reader,
        slices,
        Encoder(np.ones(n_vars), tokens, n_vars + 2, 64),
        BlockWriter(str(tmp_path), "medians", 8, 1),
    )


@dataclass(frozen=True)
class Failing:
    """A reader that fails on slice 3: `deadly` ends its worker, else storage fails the first `times`."""

    inner: Reader
    deaths: str
    times: int
    deadly: bool

    def __call__(self, part: Slice) -> RawCells:
        if part.index == 3:
            tried = len(os.listdir(self.deaths))
            if tried < self.times:
                open(os.path.join(self.deaths, str(tried)), "x").close()
                if self.deadly:
                    os._exit(1)
                raise OSError("the line is dead")
        return self.inner(part)


def run(task, tmp_path: Path, reader: Reader, attempts: int, slices: list[Slice]) -> list[SliceReport]:
    _, _, encoder, writer = task
    noted = []
    source = SliceSource(partial(counts_block, reader, attempts), slices, counts_bytes)
    reports = write_tokens(source, encoder, writer, noted.append)
    assert [faults.slice for faults in noted] == [report.slice for report in reports]
    return reports


@pytest.mark.parametrize(("deadly", "attempts"), [(True, 1), (False, 3)])
def test_what_fails_now_and_then_is_tried_again(ray_session, task, tmp_path, deadly, attempts) -> None:
    (tmp_path / "deaths").mkdir()
    reader = Failing(task[0], str(tmp_path / "deaths"), 2, deadly)
    reports = run(task, tmp_path, reader, attempts, task[1])
    assert sorted(report.slice for report in reports) == [0, 1, 2, 3, 4]
    assert not any(len(report.faults.fault) for report in reports)
    assert len(os.listdir(tmp_path / "deaths")) == 2


def test_a_slice_that_always_kills_its_worker_is_given_up(ray_session, task, tmp_path) -> None:
    (tmp_path / "deaths").mkdir()
    reader = Failing(task[0], str(tmp_path / "deaths"), 1_000, True)
    with pytest.raises(InputError, match=r"died 4 times(.|\n)*census\.slice_nnz"):
        run(task, tmp_path, reader, 1, task[1])
    assert len(os.listdir(tmp_path / "deaths")) == 4
    assert not (tmp_path / "unfinished" / "slice-000003.json").exists()


def test_storage_that_never_answers_is_a_fault_of_its_cells(ray_session, task, tmp_path) -> None:
    (tmp_path / "deaths").mkdir()
    reader = Failing(task[0], str(tmp_path / "deaths"), 1_000, False)
    reports = {report.slice: report for report in run(task, tmp_path, reader, 2, task[1])}
    assert reports[3].faults.unreadable
    assert reports[3].faults.reason == "the line is dead"
    assert len(reports[3].faults.soma_joinid) == len(task[1][3].cells)
    assert len(os.listdir(tmp_path / "deaths")) == 2
    written = {path.name for path in (tmp_path / "unfinished").iterdir()}
    assert written == {f"slice-00000{i}.json" for i in (0, 1, 2, 4)}, "another run shall try it again"


def test_a_piece_of_a_slice_never_passes_for_the_whole(task, tmp_path) -> None:
    reader, slices, encoder, writer = task
    table = counts_block(reader, 1, replace(slices[0], cells=slices[0].cells))
    n = len(table)
    with pytest.raises(RuntimeError, match=f"slice 0 came in pieces: {n - 1} of {n}"):
        encode_block(table.slice(0, n - 1), encoder, writer, {0: n})
    assert not list((tmp_path / "unfinished").iterdir())
    row = encode_block(table, encoder, writer, {0: n}).to_pylist()[0]
    report = SliceReport.from_json(row["report"])
    assert [block.row_groups for block in report.blocks] == [[8] * (n // 8) + [n % 8] * (n % 8 > 0)]
    assert (tmp_path / "unfinished/slice-000000.json").read_text() == row["report"]
    assert pq.read_table(tmp_path / report.blocks[0].file)["term"].to_pylist() == [
        "",
        *["CL:0000084"] * (n - 1),
    ]
