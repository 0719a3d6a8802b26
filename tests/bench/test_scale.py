"""`bench.py scale`: its rows and figures, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


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
    argv: list[str], told: str, refused: Callable[[list[str]], str]
) -> None:
    assert told in refused(["scale", *argv])


@pytest.mark.slow
def test_a_small_benchmark(measured: Callable[..., dict[str, Any]]) -> None:
    summary = measured(["scale", "--workers", "[2,3]", "--cells", "4"], ["stage1", "stage2"])
    for name in ("stage1", "stage2"):
        assert 0 < summary[name]["ratio"] < 1  # more GPUs are less efficient, by however little
