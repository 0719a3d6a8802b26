"""`bench.py scale`: its rows and figures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from langcell.bench import records
from langcell.bench.entry import INPUT_ERROR, main


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--workers", "[1,2]"], "two counts above 1"),
        (["--workers", "[0,2,3]"], "--workers"),
        (["--cells", "1"], "--cells 1"),
        (["--mfu", "0"], "--mfu 0"),
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
    assert main("Measure.", ["scale", *argv]) == INPUT_ERROR
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
    argv = [
        "scale",
        "--workers",
        "[2,3]",
        "--cells",
        "4",
        "--record",
        "true",
        "--dir",
        str(tmp_path / "bench"),
    ]
    assert main("Measure.", argv) == 0
    summary = json.loads((tmp_path / "bench" / "summary.json").read_text())
    assert json.loads((tmp_path / "records" / "scale.jsonl").read_text())["figures"] == summary
    for name in ("stage1", "stage2"):
        assert 0 < summary[name]["ratio"] < 1  # more GPUs are less efficient, by however little
