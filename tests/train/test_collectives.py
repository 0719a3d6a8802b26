"""What crosses ranks in a step: ids, embeddings and counts of ours, parameters of DeepSpeed's.

Cell states never do: twice as long cells, whose states are twice as large, move the same bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from langcell.batch import MicroBatch, Packed
from langcell.bench.collectives import Collective, Collectives
from langcell.bench.ranks import run_ranks
from tests.objective import toy

RANKS, LANE, JOINT = 2, 4, 8  # ranks, cells of a rank, width of the joint space
COMBINATIONS = [(1, 2), (2, 1), (3, 2)]  # ZeRO stage, stage
NUMBERS = 5
"""Of a cell: joinid, text, term, row, short; whatever they are, not its states."""


def batch(rank: int, share: float) -> MicroBatch:
    """The rank's cells, each cut to that share of its tokens (of the even number of them)."""
    whole = toy.batch(rank * LANE, LANE)
    sentences = whole.cells.tokens_T.split(whole.cells.lengths_B.tolist())
    cut = [sentence[: int(len(sentence) // 2 * 2 * share)].numpy() for sentence in sentences]
    return replace(whole, cells=Packed.from_sequences(cut))


def counted(rank: int) -> dict[Any, list[Collective]]:
    """Collectives of a step, by ZeRO stage, stage, and share of each cell."""
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions

    seen: dict[Any, list[Collective]] = {}
    for zero, number in COMBINATIONS:
        for share in (0.5, 1.0):
            train: Any = TrainOptions(micro_batch=LANE, global_batch=RANKS * LANE, zero=zero)  # type: ignore[arg-type]
            engine = build_engine(toy.stage(number), train, lr=1e-3, steps=10, device=torch.device("cpu"))
            with Collectives() as collectives:
                shares = engine(batch(rank, share), 3)
                engine.backward(shares["total"])
                engine.step()
            seen[zero, number, share] = collectives.seen
            engine.destroy()
    for share in (0.5, 1.0):
        seen["balanced, two lanes a rank", share] = of_lanes(rank, share)
    return seen


def of_lanes(rank: int, share: float) -> list[Collective]:
    """Of a step of stage 2 with two lanes a rank and balanced mining."""
    from langcell.objective.lanes import Lanes
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions
    from langcell.train.step import run_step

    lanes = Lanes.here(2 * RANKS)
    train = TrainOptions(micro_batch=LANE // 2, global_batch=RANKS * LANE)
    stage = toy.stage(2, ctm_mining="balanced")
    engine = build_engine(stage, train, lr=1e-3, steps=10, device=torch.device("cpu"), lanes=lanes.each)
    whole = batch(rank, share)
    half = [select(whole, torch.arange(2) + 2 * i) for i in range(2)]
    with Collectives() as collectives:
        run_step(engine, lanes, half, 3)
    engine.destroy()
    return collectives.seen


def select(batch: MicroBatch, row_B: torch.Tensor) -> MicroBatch:
    names = [field.name for field in fields(batch) if field.name != "cells"]
    return MicroBatch(
        cells=batch.cells.select(row_B), **{name: getattr(batch, name)[row_B] for name in names}
    )


@pytest.fixture(scope="module")
def seen() -> dict[Any, list[Collective]]:
    return run_ranks(counted, RANKS)[0]


@pytest.mark.parametrize(("zero", "number"), COMBINATIONS)
def test_cell_states_never_cross_ranks(seen: dict[Any, list[Collective]], zero: int, number: int) -> None:
    """Twice as long cells: the same collectives, in the same order, of the same bytes."""
    assert seen[zero, number, 0.5] == seen[zero, number, 1.0]


def test_nor_do_those_of_several_lanes(seen: dict[Any, list[Collective]]) -> None:
    short, long = (seen["balanced, two lanes a rank", share] for share in (0.5, 1.0))
    assert len(short) > 8
    assert short == long


@pytest.mark.parametrize(("zero", "number"), COMBINATIONS)
def test_what_is_exchanged_is_rows_and_parameters(
    seen: dict[Any, list[Collective]], zero: int, number: int
) -> None:
    """Of ours: embeddings forward (all ranks' rows) and their gradients back (the rank's own), integers and
    sums. Nothing else is as large, and DeepSpeed moves each trained parameter, padded, and little more."""
    ours = Counter((one.dtype, one.handed, one.received) for one in seen[zero, number, 1.0] if one.ours)
    rows = 4 * LANE * JOINT
    views = 1 if number == 1 else 3  # second; and first, text
    assert ours.pop(("float32", rows, RANKS * rows)) == views
    back = [shape for shape in ours if shape[:2] == ("float32", RANKS * rows)]
    assert ours.pop(back[0]) == views
    for dtype, handed, _ in ours:
        assert handed <= (8 * LANE * NUMBERS if dtype == "int64" else 4)
    trained = sum(p.numel() for p in toy.stage(number).parameters() if p.requires_grad)
    theirs = [one for one in seen[zero, number, 1.0] if not one.ours]
    gradients = sum(one.handed for one in theirs if "reduce" in one.kind)
    assert 4 * trained <= gradients < 4.1 * trained + 1_000
    if zero < 3:  # at 3 parameters are gathered module by module, each time they are needed
        assert (
            4 * trained <= sum(one.received for one in theirs if "gather" in one.kind) < 4.1 * trained + 1_000
        )
