"""The trace of a stage's steps: which ones, and what stands in the files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from torch.profiler import record_function

from langcell.storage import open_root
from langcell.train.profile import WAIT, WARMUP, Profile


def loop(profile: Profile, steps: int) -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    with profile:
        for step in range(steps):
            with record_function(f"step {step}"):
                (weight @ weight).sum().backward()
            profile.step()


def labels(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name")).startswith("step ")})


def test_the_steps_after_the_first_ones_are_traced(tmp_path: Path) -> None:
    loop(Profile(open_root(str(tmp_path)), "stage-1", 2), 10)
    first = WAIT + WARMUP
    assert labels(tmp_path / "profile" / "stage-1.json.gz") == [f"step {first}", f"step {first + 1}"]
    table = (tmp_path / "profile" / "stage-1.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table


def test_a_short_stage_leaves_what_was_recorded(tmp_path: Path) -> None:
    loop(Profile(open_root(str(tmp_path)), "stage-1", 50), WAIT + WARMUP + 1)
    assert labels(tmp_path / "profile" / "stage-1.json.gz") == [f"step {WAIT + WARMUP}"]


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    loop(Profile(open_root(str(tmp_path)), "stage-1", 0), 10)
    assert list(tmp_path.iterdir()) == []
