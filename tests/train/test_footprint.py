"""What a worker is said to take: held against what it does take."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.model.interop import build_model
from langcell.model.options import ModelOptions
from langcell.objective.options import ObjectiveOptions
from langcell.objective.stages import Stage
from langcell.train.footprint import Footprint, footprint, saved_bytes
from langcell.train.options import TrainOptions

VOCABULARY = 25_427
RECORD = Path(__file__).parents[2] / "jobs" / "records" / "step.jsonl"
ONE = TrainOptions(num_workers=1, global_batch=6, micro_batch=6)


def sequences(count: int, length: int, vocabulary: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(10, vocabulary - 1, (count, length)))


@cache
def stage(number: int, layers: int = 6, width: int = 256) -> Stage:
    rows = np.arange(36)  # of three lengths
    texts = TextTable(
        Packed.from_sequences([row for n in (15, 30, 60) for row in sequences(12, n, 30_000)]),
        text_id=rows,
        row_KV=rows[:, None],
        term=rows,
        related_CC=torch.zeros(36, 36, dtype=torch.bool),
    )
    model = build_model(ModelOptions(cell_layers=layers, cell_width=width), VOCABULARY, 2048, seed=0)
    return Stage(
        model,
        ObjectiveOptions(),
        stage=number,
        cls=VOCABULARY - 1,
        seed=0,
        text_train="all",
        texts=texts,
    )


def batch(times: int) -> MicroBatch:
    """Twelve cells of 64 tokens with texts of 15, or so many times as long."""
    ids = torch.arange(12)
    row = ids + 12 * (times // 2)
    cells = [np.r_[VOCABULARY - 1, genes] for genes in sequences(12, 64 * times - 1, VOCABULARY)]
    return MicroBatch(Packed.from_sequences(cells), ids, row, row, row, torch.zeros(12, dtype=torch.bool))


def told(number: int = 2, tokens: float = 12 * 64, *, workers: int = 1, **options: object) -> Footprint:
    return footprint(
        stage(number, 2, 64),
        (batch(1), batch(2)),
        tokens=tokens,
        genes=0.15 * tokens,
        options=replace(ONE, **options),  # type: ignore[arg-type]
        workers=workers,
        bf16=False,
        gpu=False,
    )


@pytest.mark.parametrize("number", [1, 2])
def test_the_line_through_two_batches_meets_a_third(number: int) -> None:
    saved = sum(saved_bytes(stage(number, 2, 64), batch(4)))
    assert told(number, 4 * 12 * 64).activations == pytest.approx(saved, rel=0.03)


def test_what_is_saved_for_one_layer_is_what_its_operations_need() -> None:
    """A linear layer saves its input; ReLU its output; parameters are not counted, nor a tensor twice."""

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 32)

        def forward(self, batch: torch.Tensor, step: int) -> torch.Tensor:
            return self.linear(batch).relu().sum()

    floats, others = saved_bytes(Toy(), torch.ones(10, 16))  # type: ignore[arg-type]
    assert (floats, others) == (4 * (10 * 16 + 10 * 32), 0)


def test_zero_shards_what_it_says() -> None:
    parameters = sum(parameter.numel() for parameter in stage(2, 2, 64).parameters())
    alone = told()
    assert (alone.weights, alone.gradients, alone.optimizer) == pytest.approx(
        (4 * parameters, 4 * parameters, 12 * parameters)
    )
    for zero, shards in ((1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))):
        of_eight = told(workers=8, zero=zero, global_batch=48)
        for name, shard in zip(("weights", "gradients", "optimizer"), shards, strict=True):
            assert getattr(of_eight, name) == pytest.approx(getattr(alone, name) / shard), (zero, name)
        assert of_eight.activations == alone.activations
    assert told(offload=True).optimizer == 0


@pytest.mark.parametrize("number", [1, 2])
def test_measured_peaks_are_met(number: int) -> None:
    """The newest record of the benchmark on a CPU: 6 cells of 1,332 tokens, texts of 315."""
    records = [json.loads(line) for line in RECORD.read_text().splitlines()]
    found = next(r for r in reversed(records) if "6x256" in r["figures"]["details"]["sizes"])
    sizes = found["figures"]["details"]["sizes"]["6x256"][str(number)]
    if sizes["device"]["name"] != "cpu":
        pytest.skip("the newest record is of a GPU")
    tokens = 6 * sizes["lengths"]["cells"]["mean"]
    expected = footprint(
        stage(number),
        (batch(1), batch(2)),
        tokens=tokens,
        genes=0.15 * tokens,
        options=ONE,
        workers=1,
        bf16=False,
        gpu=False,
    )
    assert expected.total / 1e6 == pytest.approx(sizes["ours"]["peak_mb"], rel=0.25)
