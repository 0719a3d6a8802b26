"""`bench.py step`: its rows and figures, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from langcell.bench import records, step
from langcell.bench.entry import INPUT_ERROR, main
from langcell.bench.step_work import gradient_difference


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--micro_batch", "1"], "--micro_batch is 1"),
        (["--cells", "20", "--micro_batch", "16"], "--cells is 20; the steps take 32"),
        (["--device", "tpu"], "device"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("Measure.", ["step", *argv]) == INPUT_ERROR
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("Measure.", ["step", "--device", "cuda", "--dir", str(tmp_path)]) == INPUT_ERROR
    assert "PyTorch sees no GPU" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_gradients_that_are_rounding_do_not_count() -> None:
    theirs = {"weight": torch.tensor([3.0, 4.0]), "key.bias": torch.tensor([1e-9])}
    ours = {"weight": torch.tensor([3.0, 4.01]), "key.bias": torch.tensor([-1e-9])}
    found = gradient_difference(ours, theirs)
    assert found["gradient_difference"] == pytest.approx(0.002, rel=1e-3)
    assert found["worst_gradient_difference"] == pytest.approx(0.002, rel=1e-3)


@pytest.mark.slow
def test_a_small_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
    argv = ["step", "--cells", "300", "--micro_batch", "2", "--repeats", "1", "--compared_cells", "2"]
    argv += ["--record", "true", "--dir", str(tmp_path / "bench")]
    assert main("Measure.", argv) == 0

    summary = json.loads((tmp_path / "bench" / "summary.json").read_text())
    assert [name for name in summary if name != "details"] == ["stage1", "stage2"]
    for name in ("stage1", "stage2"):
        each = summary[name]
        assert set(each) == {"ours", "baseline", "ratio", "unit", "peak_mb"}
        assert each["ratio"] == pytest.approx(each["ours"] / each["baseline"])
    record = json.loads((tmp_path / "records" / "step.jsonl").read_text())
    assert record["figures"] == summary
    details = summary["details"]
    assert details["gpu"] == "not measured"
    first, second = (details["sizes"]["6x256"][stage] for stage in ("1", "2"))
    assert set(first["alone"]) == {"packing", "masked_projection", "shared_view"}
    assert set(second["alone"]) == {"packing", "shared_keys", "distinct_texts"}
    assert first["alone"]["shared_view"]["allowed"] > 1.2
    for found in (first, second):
        assert found["ours"]["allowed"] > found["alone"]["packing"]["allowed"] > 1
        assert found["equal"]["loss_difference"] < 1e-4
        assert found["lengths"]["cells"]["n"] == 300
    assert "shared_keys" in capsys.readouterr().out
    assert step.table(summary).count("\n") > 12
