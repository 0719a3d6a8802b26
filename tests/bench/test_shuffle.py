"""`bench.py shuffle`: what it counts in a batch, and that the order it counts is the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import entropy

from langcell.bench.shuffle import (
    Cells,
    census_cells,
    cost,
    full_shuffle,
    mixing,
    no_shuffle,
    planned,
    row_groups_of,
)
from langcell.corpus.plan import Plan
from langcell.corpus.schema import BLOCK_ENCODING, BLOCK_SCHEMA
from langcell.corpus.stream import deal_window

G, B, M = 64, 16, 4
ROUND = M * G
ROWS = [
    f"{unit}_{figure}"
    for unit in ("global", "micro")
    for figure in ("type_bits", "text_bits", "dataset_bits", "text_distinct", "dataset_distinct")
]


def standing(datasets: int, each: int) -> Cells:
    """Datasets of so many cells one after the other, a block each; four types in turn, a text a (dataset,
    type)."""
    dataset_C = np.repeat(np.arange(datasets), each)
    type_C = np.arange(datasets * each) % 4
    facets = {"type": type_C, "text": 4 * dataset_C + type_C, "dataset": dataset_C}
    length_C = np.random.default_rng(0).integers(2, 2048, datasets * each)
    return Cells(facets, length_C, [each] * datasets)


def plan_of(cells: Cells, row_group_cells: int, seed: int = 0) -> Plan:
    return Plan(row_groups_of(cells.rows, row_group_cells), seed, G, B, M)


@pytest.mark.parametrize("in_a_round", [1, 2, 4])
def test_a_global_batch_sees_the_row_groups_of_its_round_and_no_more(in_a_round: int) -> None:
    each = ROUND // in_a_round
    cells = standing(16, each)
    found = mixing(cells, planned(plan_of(cells, each), cells.length_C))
    of_global, of_micro = found["global"]["dataset"], found["micro"]["dataset"]
    assert of_global["bits"] == {"mean": np.log2(in_a_round), "spread": 0}
    assert of_global["distinct"] == {"mean": in_a_round, "spread": 0}
    assert of_global["largest"] == {"mean": 1 / in_a_round, "spread": 0}
    # A lane's window is a quarter of the round at the most: it lies in one row group.
    assert of_micro["distinct"] == {"mean": 1, "spread": 0}
    # Inside a window the cells are well mixed: the four types that a batch of 64 can hold.
    assert found["global"]["type"]["bits"]["mean"] == pytest.approx(2, abs=0.1)


def test_row_groups_of_one_cell_are_a_full_shuffle() -> None:
    cells = standing(32, 512)
    plan = plan_of(cells, 1)
    ours, full = mixing(cells, planned(plan, cells.length_C)), mixing(cells, full_shuffle(plan, 0))
    none = mixing(cells, no_shuffle(plan))
    for unit, facets in full.items():
        batches = plan.steps * (1 if unit == "global" else plan.lanes)
        for facet, figures in facets.items():
            for name, figure in figures.items():
                # Five standard errors of the difference of two means, and what rounding takes.
                noise = 5 * figure["spread"] * (2 / batches) ** 0.5 + 1e-5
                assert ours[unit][facet][name]["mean"] == pytest.approx(figure["mean"], abs=noise)
        assert none[unit]["dataset"]["bits"]["mean"] == 0


def test_the_figures_are_those_of_each_batch() -> None:
    cells = standing(5, 700)
    plan = plan_of(cells, 100)
    order_SVB = planned(plan, cells.length_C)
    found = mixing(cells, order_SVB)
    for unit, order_Nn in (("global", order_SVB.reshape(-1, G)), ("micro", order_SVB.reshape(-1, B))):
        for facet, code_C in cells.facets.items():
            counts = [np.unique(code_C[row], return_counts=True)[1] for row in order_Nn]
            wanted = {
                "bits": [entropy(count, base=2) for count in counts],
                "distinct": [len(count) for count in counts],
                "largest": [count.max() / order_Nn.shape[1] for count in counts],
            }
            for name, values in wanted.items():
                assert found[unit][facet][name]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
                assert found[unit][facet][name]["spread"] == pytest.approx(np.std(values), abs=1e-5)


def test_the_order_measured_is_the_order_trained(tmp_path: Path) -> None:
    rows = [300, 77, 411]
    cells = Cells({}, np.random.default_rng(1).integers(2, 9, sum(rows)), rows)
    plan = plan_of(cells, 90)
    first = 0
    for block, count in enumerate(rows):
        length = cells.length_C[first : first + count]
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        table = pa.table(
            [
                pa.array(np.arange(first, first + count)),
                pa.ListArray.from_arrays(offsets, pa.array(np.ones(offsets[-1], np.uint16))),
                pa.array(length.astype(np.int32)),
                pa.array(np.zeros(count, np.int64)),
                pa.array([""] * count),
            ],
            names=BLOCK_SCHEMA.names,
        ).cast(BLOCK_SCHEMA)
        path = tmp_path / next(g.file for g in row_groups_of(rows, 90) if f"{block:06d}" in g.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=90, **BLOCK_ENCODING)
        first += count
    order_SVB = planned(plan, cells.length_C)
    assert len(np.unique(order_SVB)) == order_SVB.size == plan.steps * G  # each cell once
    for lane in range(plan.lanes):
        for window in plan.windows(0, lane):
            dealt = deal_window(str(tmp_path), plan, window)["soma_joinid"].to_pylist()
            ours = order_SVB[window.first_step : window.first_step + window.steps, lane]
            assert [sorted(joinids) for joinids in dealt] == np.sort(ours, axis=1).tolist()


def test_a_window_reads_its_row_groups_whole() -> None:
    cells = standing(16, ROUND)
    window = M * B
    spent = cost(plan_of(cells, ROUND), 1000.0)
    assert spent == {"rows_read_per_row": ROUND / window, "files": 1, "window_mb": window * 2000 / 1e6}
    spent = cost(plan_of(cells, window // 4), 1000.0)
    assert spent["rows_read_per_row"] == 1
    assert spent["files"] == 4


def test_every_figure_is_a_function_of_the_seed() -> None:
    def measured(seed: int) -> Any:
        cells = census_cells(12_000, seed)
        plan = plan_of(cells, 32, seed)
        return mixing(cells, planned(plan, cells.length_C)), mixing(cells, full_shuffle(plan, seed))

    assert measured(1) == measured(1)
    assert measured(1) != measured(2)


def test_a_small_benchmark(measured: Callable[..., dict[str, Any]]) -> None:
    sizes = ["--global_batch", "[64,128]", "--micro_batch", "[16,16]"]
    layouts = ["--row_group_cells", "[16]", "--window_steps", "[64]"]
    summary = measured(["shuffle", "--cells", "60000", *sizes, *layouts], ROWS)
    details = summary["details"]
    default, fine = details["plans"][:2]
    assert (default["batch"], fine["row_group_cells"], fine["window_steps"]) == ("64/16", 16, 64)
    assert summary["global_dataset_bits"]["ours"] == default["global"]["dataset"]["bits"]["mean"]
    for unit in ("global", "micro"):
        shares = [
            found[unit]["dataset"]["bits"]["share"]
            for found in (details["no_shuffle"]["64/16"], default, fine)
        ]
        assert shares == sorted(shares)
        assert shares[0] < 0.2
        assert 0.9 < shares[2] < 1.02
    corpus = details["corpus"]
    assert corpus["train_cells"] < corpus["cells"]
    assert 0.4 < corpus["dataset"]["bits"] / np.log2(corpus["dataset"]["count"]) < 1
    # What the generator's own counts have: 1,670 non-zeros a cell, a quarter of the cells cut.
    assert 1_300 < corpus["tokens_mean"] < 1_400


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--global_batch", "[64]"], "go together"),
        (["--global_batch", "[60]", "--micro_batch", "[16]"], "no multiple"),
        (["--window_steps", "[0]"], "--window_steps"),
        (["--cells", "0"], "--cells"),
        (["--cells", "3000", "--global_batch", "[4096]", "--micro_batch", "[16]"], "fewer than one global"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], told: str, refused: Callable[[list[str]], str]
) -> None:
    assert told in refused(["shuffle", *argv])
