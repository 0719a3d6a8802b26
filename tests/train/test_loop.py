"""One stage under Ray Train: every ZeRO stage runs; the record of its steps is cut back to a cursor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from langcell.recipes.training import fit
from langcell.storage import open_root, write_file
from langcell.train import metrics
from langcell.train.trackers import Trackers, Tracking
from tests.faults.making import Tiny


@pytest.mark.slow
def test_zero_3_trains_validates_and_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    """At ZeRO 3 the losses are ZeRO 2's, and the checkpoint holds whole weights."""
    runs = {}
    for zero in (2, 3):
        _, task = tiny.tasks(tmp_path / f"zero{zero}", zero=zero, stage2_epochs=1)
        runs[zero] = fit(replace(task, first_step=0))
    two, three = (tiny.losses(tmp_path / f"zero{zero}") for zero in (2, 3))
    for a, b in zip(two, three, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    weights = {zero: trained.weights for zero, trained in runs.items()}
    assert weights[2].keys() == weights[3].keys()
    for name, tensor in weights[2].items():
        assert weights[3][name].shape == tensor.shape, name


def test_half_a_row_spoils_no_other(tmp_path: Path) -> None:
    """What a full disk took of a row, and the row again after it."""
    root = open_root(str(tmp_path))
    write_file(root, metrics.METRICS, b'{"step": 0}\n{"step": 1, "ti\n{"step": 1}\n{"step": 2')
    assert [row["step"] for row in metrics.read(root, metrics.METRICS)] == [0, 1]


def test_metrics_are_cut_back_and_the_cut_is_counted(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    rows = [f'{{"step": {i}, "stage": 2, "epoch": 0, "time": {100 + i}}}\n' for i in range(5)]
    text = "".join(rows) + '{"step": 5, "ti'
    write_file(root, metrics.METRICS, text.encode())
    assert len(metrics.cut_back(root, 1, 0)) == 5
    assert (tmp_path / metrics.METRICS).read_text().endswith("\n"), "half a line would spoil the next one"
    assert metrics.read(root, metrics.RECOVERIES) == []
    assert [row["step"] for row in metrics.cut_back(root, 2, 3)] == [0, 1, 2]
    assert [row["step"] for row in metrics.read(root, metrics.METRICS)] == [0, 1, 2]
    assert metrics.read(root, metrics.RECOVERIES) == [{"step": 3, "steps_replayed": 2, "stopped": 104}]
    metrics.cut_back(root, 2, 2)  # it came to no step, and went back further: one interruption
    assert metrics.read(root, metrics.RECOVERIES) == [{"step": 2, "steps_replayed": 3, "stopped": 104}]
    run = metrics.Metrics(root, "run", 2, 2, Trackers(Tracking(), root, str(tmp_path), 2))
    run.write({"step": 2, "stage": 2, "epoch": 0, "time": 200.0}, {})
    run.close()
    metrics.cut_back(root, 2, 3)  # stopped with nothing lost: a recovery all the same
    first, second = metrics.read(root, metrics.RECOVERIES)
    assert first == {"step": 2, "steps_replayed": 3, "stopped": 104, "resumed": 200}
    assert second == {"step": 3, "steps_replayed": 0, "stopped": 200}
