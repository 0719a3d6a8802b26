"""Processes that take turns. Nothing else is imported here: each process imports this file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from langcell.bench.turns import Kept


def adder(first: int) -> Callable[[int], int]:
    held = [first]

    def add(number: int) -> int:
        held[0] += number
        return held[0]

    return add


def failing(_: int) -> Callable[[], None]:
    raise ValueError("not ready")


def test_processes_take_turns_and_keep_what_they_hold() -> None:
    with Kept(adder, 1, cpus=1) as one, Kept(adder, 10, cpus=1) as other:
        values = [kept.turn(1) for kept in (one, other, one, other)]
    assert [value for value, _ in values] == [2, 11, 3, 12]
    assert all(peak_mb > 5 for _, peak_mb in values)
    with Kept(failing, 1, cpus=1) as kept, pytest.raises(ValueError, match="not ready"):
        kept.wait()
