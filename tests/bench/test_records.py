"""A record says what was measured, where, when and of which commit; records are only added to."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from langcell.bench.options import AnnotateOptions
from langcell.bench.records import FOLDER, LIBRARIES, append_record, commit, parameters


def test_records_are_added_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "records" / "data.jsonl"
    for ratio in (2.0, 3.0):
        append_record(path, {"cells": 10}, {"beta": {"ratio": ratio}})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["figures"]["beta"]["ratio"] for record in records] == [2.0, 3.0]
    for record in records:
        assert set(record) == {"date", "commit", "dirty", "machine", "parameters", "figures"}
        age = datetime.now(UTC) - datetime.fromisoformat(record["date"])
        assert 0 <= age.total_seconds() < 60
        assert record["parameters"] == {"cells": 10}
        machine = record["machine"]
        assert machine["cpu"]
        assert machine["cores"] >= 1
        assert machine["memory_gib"] > 0.5
        assert set(machine["libraries"]) == set(LIBRARIES)


def test_the_commit_is_the_one_checked_out() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert commit() == {"commit": None, "dirty": None}
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert commit()["commit"] == head.stdout.strip()
    assert isinstance(commit()["dirty"], bool)


def test_a_record_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    inside = FOLDER.parents[1] / "runs" / "demo" / "export"
    for model, named in ((str(inside), "runs/demo/export"), (str(tmp_path / "mine"), "mine"), (None, None)):
        found = parameters(AnnotateOptions(cells=7, model=model, dir=str(tmp_path), record=True))
        assert (found["cells"], found["model"]) == (7, named)
        assert str(tmp_path) not in str(found)
