"""Checkpoints of real engines: any number of ranks and any ZeRO stage go on where another stood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from langcell.bench.ranks import run_ranks
from langcell.storage import open_root
from tests.objective import toy

LANES, COUNT, LR = 6, 2, 1e-3
BEFORE, AFTER = 2, 2
CASES = [("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
Run = tuple[list[float], dict[str, Tensor]]
"""The loss of each step, and the weights after the last."""


def engine_of(precision: str, zero: int, lanes: Any, held: Any = None) -> Any:
    """A new engine, or one that goes on from a checkpoint."""
    from langcell.train import checkpoint
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions

    train = TrainOptions(
        global_batch=LANES * COUNT, micro_batch=COUNT, text_lr=LR, clip=0.5, zero=zero, precision=precision
    )
    stage = toy.stage(2, dropout=0.1, tau_learnt=True, tau=0.2)
    done = 0
    if held is not None:
        checkpoint.load_weights(held, stage)
        done = held.record.cursor.step
    engine = build_engine(
        stage, train, lr=LR, steps=10, device=torch.device("cpu"), lanes=lanes.each, done=done
    )
    if held is not None:
        checkpoint.restore(engine, held)
    return engine


def steps(engine: Any, lanes: Any, first: int, last: int) -> list[float]:
    import torch.distributed as dist

    from langcell.train.step import run_step

    losses = []
    for step in range(first, last):
        shares = run_step(engine, lanes, [toy.batch(lane * COUNT, COUNT) for lane in lanes.owned], step)
        loss = torch.stack([shares[name] for name in ("mgm", "cc", "ct", "ctm")]).sum()
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


def saver_of(directory: str) -> Any:
    from langcell.train import liveness
    from langcell.train.saver import Keep, Saver
    from langcell.train.store import Store
    from langcell.train.trace import Trace

    store = Store(open_root(directory), 2)
    return Saver(
        store, liveness.clone(liveness.board()), Trace(), Keep(2, False),
        token="aaaaaaaa", start=0, before_commit=lambda: None, alive=lambda: None,
    )  # fmt: skip


def straight_and_saved(rank: int, directory: str) -> dict[tuple[str, int], Run]:
    """Steps of an engine that saves itself between them, by precision and stage."""
    from langcell.objective.lanes import Lanes
    from langcell.train import checkpoint
    from langcell.train.store import Cursor

    lanes, seen = Lanes.here(LANES), {}
    for precision, zero in CASES:
        engine = engine_of(precision, zero, lanes)
        steps(engine, lanes, 0, BEFORE)
        saver = saver_of(f"{directory}/{precision}-{zero}")
        assert saver.save_now(
            torch.device("cpu"), engine, Cursor(2, 0, BEFORE, BEFORE, "plan"), None, ends_epoch=False
        )
        losses = steps(engine, lanes, BEFORE, BEFORE + AFTER)
        seen[precision, zero] = (losses, checkpoint.whole_weights(engine))
        engine.destroy()
    return seen


def gone_on(rank: int, directory: str, cases: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], Run]:
    """The steps after the checkpoint of (precision, stage), by an engine of another stage."""
    from langcell.objective.lanes import Lanes
    from langcell.train import checkpoint
    from langcell.train.store import Store

    lanes, seen = Lanes.here(LANES), {}
    for precision, zero, then in cases:
        held = checkpoint.find(Store(open_root(f"{directory}/{precision}-{zero}"), 2), torch.device("cpu"))
        assert held is not None
        engine = engine_of(precision, then, lanes, held)
        losses = steps(engine, lanes, BEFORE, BEFORE + AFTER)
        seen[precision, zero, then] = (losses, checkpoint.whole_weights(engine))
        engine.destroy()
    return seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[tuple[str, int], Run]]:
    """Checkpoints of two ranks, and what these did after them."""
    directory = str(tmp_path_factory.mktemp("saved"))
    return directory, run_ranks(straight_and_saved, 2, directory)[0]


def test_the_same_ranks_go_on_to_the_last_bit(saved: tuple[str, dict[tuple[str, int], Run]]) -> None:
    """Dropout on, three lanes a rank, a learnt temperature, a schedule, clipping; in bf16, whose weights are
    not what the optimiser moves, at every stage."""
    directory, straight = saved
    for (precision, zero, _), (losses, weights) in run_ranks(
        gone_on, 2, directory, [(*c, c[1]) for c in CASES]
    )[0].items():
        expected, expected_weights = straight[precision, zero]
        assert losses == expected, (precision, zero)
        assert weights.keys() == expected_weights.keys()
        for name, weight in expected_weights.items():
            assert torch.equal(weights[name], weight), (precision, zero, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_and_stages_go_on(saved: tuple[str, dict[tuple[str, int], Run]], ranks: int) -> None:
    """2 -> 1 and 2 -> 3 ranks, also from one ZeRO stage to another: the same losses to 1e-5."""
    directory, straight = saved
    cases = [("fp32", 1, 1), ("fp32", 2, 3), ("fp32", 3, 3), ("fp32", 3, 2)]
    for (precision, zero, then), (losses, weights) in run_ranks(gone_on, ranks, directory, cases)[0].items():
        expected, expected_weights = straight[precision, zero]
        assert losses == pytest.approx(expected, rel=1e-5), (zero, then)
        for name, weight in expected_weights.items():
            if name.endswith("key.bias"):
                continue  # softmax does not see it: its gradient is rounding, of which Adam makes a step
            torch.testing.assert_close(
                weights[name], weight, rtol=1e-4, atol=2e-5, msg=f"{zero} {then} {name}"
            )
