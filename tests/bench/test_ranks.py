"""Ranks on this machine: their results in order, and the one that fails is the one that is told."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from langcell.bench.ranks import run_ranks


def summed(rank: int, factor: int) -> int:
    value = torch.tensor(factor * (rank + 1))
    dist.all_reduce(value)
    return int(value) + rank


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()  # for ever: rank 1 does not come


def fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("broken")


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(summed, 2, 10) == [30, 31]


def test_a_rank_that_dies_is_named_and_the_others_are_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended with 3"):
        run_ranks(dies, 2)
    assert time.monotonic() - began < 60  # not the ten minutes of a rank that hangs


def test_what_a_rank_raises_is_raised_here() -> None:
    with pytest.raises(KeyError, match="broken"):
        run_ranks(fails, 2)
