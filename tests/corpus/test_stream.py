"""Streams: the plan's order, every cell once, and a resume that is the rest of the uninterrupted one."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from langcell.batch import Packed, TextTable
from langcell.corpus import stream as streams
from langcell.corpus.microbatch import draw_variants, micro_batch
from langcell.corpus.plan import Epoch, Plan, Position, RowGroups, Span, Window
from langcell.corpus.schema import BLOCK_SCHEMA
from langcell.corpus.stream import deal_window, read_cells, stream

TEXTS = [11, 22, 33]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Plan]:
    """Three files of 50 cells in row groups of 20, and a plan of two lanes of 4 cells."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    groups = []
    for index in range(3):
        joinid = np.arange(50) + 50 * index
        # A cell's tokens are its own joinid and position, so that a mix-up would show.
        tokens = [[int(j), *range(100, 100 + rng.integers(0, 9))] for j in joinid]
        table = pa.table(
            [joinid, tokens, [len(t) for t in tokens], [TEXTS[j % 3] for j in joinid], [""] * 50],
            schema=BLOCK_SCHEMA,
        )
        pq.write_table(table, root / f"{index}.parquet", row_group_size=20)
        groups.append(RowGroups(f"{index}.parquet", (20, 20, 10)))
    return str(root), Plan(tuple(groups), seed=3, global_batch=8, micro_batch=4, window_steps=5)


def _steps(
    corpus: tuple[str, Plan], lanes: list[int], start: Position
) -> list[tuple[int, int, list[list[int]]]]:
    directory, plan = corpus
    return [
        (position.epoch, position.step, rows["soma_joinid"].to_pylist())
        for position, rows in stream(directory, plan, lanes=lanes, epochs=2, start=start, prefetch=2)
    ]


def _read(corpus: tuple[str, Plan], lane: int, start: Position) -> list[tuple[int, int, list[int]]]:
    return [(epoch, step, joinid) for epoch, step, [joinid] in _steps(corpus, [lane], start)]


def test_streams_follow_the_plan_and_resume_in_it(ray_session: None, corpus: tuple[str, Plan]) -> None:
    directory, plan = corpus
    lanes = [_read(corpus, lane, Position(0, 0)) for lane in range(2)]
    for lane, rows in enumerate(lanes):
        assert [(epoch, step) for epoch, step, _ in rows] == [
            (e, s) for e in (0, 1) for s in range(plan.steps)
        ]
        direct = [
            batch
            for epoch in (0, 1)
            for window in plan.windows(epoch, lane)
            for batch in deal_window(directory, plan, window)["soma_joinid"].to_pylist()
        ]
        assert [joinid for _, _, joinid in rows] == direct
    for epoch in (0, 1):
        seen = [j for rows in lanes for e, _, joinid in rows if e == epoch for j in joinid]
        assert len(seen) == len(set(seen)) == plan.cells - plan.dropped
    both = [(*a[:2], [a[2], b[2]]) for a, b in zip(*lanes, strict=True)]
    assert _steps(corpus, [0, 1], Position(0, 0)) == both  # a rank that owns two: step by step
    assert _steps(corpus, [0, 1], Position(0, 7)) == both[7:]
    assert _read(corpus, 1, Position(0, 7)) == lanes[1][7:]
    assert _read(corpus, 0, Position(1, 0)) == lanes[0][plan.steps :]


def test_a_long_stage_is_several_laps(
    ray_session: None, corpus: tuple[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = corpus
    assert plan.rounds == 4
    whole = _steps(corpus, [0, 1], Position(0, 3))
    monkeypatch.setattr(streams, "LAP", 3)  # ends in both epochs' middle
    assert _steps(corpus, [0, 1], Position(0, 3)) == whole
    assert _steps(corpus, [0, 1], Position(1, 2)) == whole[plan.steps - 1 :]


def test_windows_are_left_to_the_tasks(
    ray_session: None, corpus: tuple[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that made them would hold all of a stage before its first step."""
    made: list[int] = []
    monkeypatch.setattr(Epoch, "__init__", lambda self, plan, epoch: made.append(epoch))
    directory, plan = corpus
    steps = stream(directory, plan, lanes=[0], epochs=10_000, start=Position(0, 0), prefetch=1)
    assert next(steps)[0] == Position(0, 0)
    assert not made


@pytest.mark.slow
def test_its_scheduler_rests_while_nobody_takes(
    ray_session: None, corpus: tuple[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares the worker's interpreter with the step, and has nothing to do: blocks wait to be taken."""
    looks = 0
    rest = streams.Pace.on_execution_step

    def look(self: streams.Pace, executor: Any) -> None:
        nonlocal looks
        looks += 1
        rest(self, executor)

    monkeypatch.setattr(streams.Pace, "on_execution_step", look)
    directory, plan = corpus
    steps = stream(directory, plan, lanes=[0], epochs=10_000, start=Position(0, 0), prefetch=1)
    next(steps)
    before = looks
    time.sleep(1)
    assert 0 < looks - before <= 1 / streams.REST_S + 1


def test_cells_are_read_in_the_order_of_the_spans(corpus: tuple[str, Plan]) -> None:
    """Neighbours in a file too, backwards and with others between them."""
    whole = [("2", 1), ("2", 0), ("0", 2), ("2", 2)]
    spans = [Span("1.parquet", 0, 13, 20)]
    spans += [Span(f"{file}.parquet", index, 0, 10 if index == 2 else 20) for file, index in whole]
    spans.append(Span("0.parquet", 0, 0, 4))
    joinids = [
        joinid
        for span in spans
        for joinid in np.arange(span.start, span.stop) + 50 * int(span.file[0]) + 20 * span.index
    ]
    read = read_cells(corpus[0], Window(0, 0, 0, 0, 1, tuple(spans)))
    assert read["soma_joinid"].to_pylist() == joinids
    assert [tokens[0] for tokens in read["tokens"].to_pylist()] == joinids
    inside = read_cells(corpus[0], Window(0, 0, 0, 0, 1, (Span("1.parquet", 1, 3, 5),)))
    assert inside["soma_joinid"].to_pylist() == [73, 74]


def test_tokens_stay_with_their_cell(corpus: tuple[str, Plan]) -> None:
    directory, plan = corpus
    table = TextTable(
        Packed.from_sequences([[i] for i in range(6)]),
        text_id=np.array(TEXTS),
        row_KV=np.arange(6).reshape(3, 2),
        term=np.array([0, 2, 1]),
        related_CC=torch.zeros(3, 3, dtype=torch.bool),
    )
    for window in plan.windows(0, 0):
        rows = deal_window(directory, plan, window)
        for i in range(len(rows)):
            batch = micro_batch(rows.slice(i, 1), table, epoch=0, short_share=0.5, seed=1)
            assert len(batch) == plan.micro_batch
            assert torch.equal(batch.cells.tokens_T[batch.cells.starts_B], batch.soma_joinid_B)
            text = batch.soma_joinid_B % 3
            assert torch.equal(batch.text_id_B, torch.tensor(TEXTS)[text])
            assert torch.equal(batch.term_B, torch.tensor([0, 2, 1])[text])
            assert torch.equal(batch.text_row_B, 2 * text + batch.short_B)


def test_a_text_that_the_table_lacks_is_an_error(corpus: tuple[str, Plan]) -> None:
    directory, plan = corpus
    [window, *_] = plan.windows(0, 0)
    table = TextTable(
        Packed.from_sequences([[0]]), np.array([11]), np.zeros((1, 1), int), np.array([0]), torch.zeros(1, 1)
    )
    with pytest.raises(KeyError, match="not in the corpus's text table"):
        micro_batch(deal_window(directory, plan, window).slice(0, 1), table, epoch=0, short_share=0, seed=0)


def test_one_variant_a_text_and_epoch() -> None:
    """All cells of a text read the same variant; over epochs the shortened share is what was asked for."""
    ids = np.array([5, -7, 5, 9, -7])
    drawn = np.array([draw_variants(ids, variants=4, short_share=0.25, seed=0, epoch=e) for e in range(2000)])
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 1] == drawn[:, 4]).all()
    for column in (0, 1, 3):
        assert abs((drawn[:, column] > 0).mean() - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
        assert set(drawn[:, column]) == {0, 1, 2, 3}
    alone = draw_variants(ids[3:4], variants=4, short_share=0.25, seed=0, epoch=5)
    assert alone[0] == drawn[5, 3]


def test_packing_does_not_share_arrows_memory() -> None:
    """Arrow's arrays are read-only; a tensor over them could be written through."""
    tokens = pa.array([1, 2, 3], pa.int64()).to_numpy()
    packed = Packed.from_offsets(tokens, pa.array([0, 3], pa.int32()).to_numpy())
    packed.tokens_T[0] = 9
    assert tokens.tolist() == [1, 2, 3]
