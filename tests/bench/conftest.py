"""A benchmark run in a folder of its own: what it refuses, and what it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from langcell.bench import records
from langcell.bench.entry import INPUT_ERROR, main


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], str]:
    """Starts a benchmark that must be refused before anything is written; what it says."""

    def run(argv: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        assert main("Measure.", argv) == INPUT_ERROR
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert os.listdir(tmp_path) == []
        return message

    return run


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark to its end, with a record; its summary, whose headline rows must be `rows`."""

    def run(argv: list[str], rows: list[str]) -> dict[str, Any]:
        monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
        assert main("Measure.", [*argv, "--record", "true", "--dir", str(tmp_path / "bench")]) == 0
        summary: dict[str, Any] = json.loads((tmp_path / "bench" / "summary.json").read_text())
        record = json.loads((tmp_path / "records" / f"{argv[0]}.jsonl").read_text())
        assert record["figures"] == summary
        assert [name for name in summary if name != "details"] == rows
        for name in rows:
            each = summary[name]
            assert set(each) == {"ours", "baseline", "ratio", "unit", "peak_mb"}
            assert each["ratio"] == pytest.approx(each["ours"] / each["baseline"])
        return summary

    return run
