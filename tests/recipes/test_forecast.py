"""What `jobs/pretrain.py --plan` says, held against what the job would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from langcell.model.flops import Work, peak_flops, step_flops
from langcell.recipes import forecast
from langcell.recipes.training import make_plans
from tests.recipes.making import RECORDS, config


def test_the_steps_are_those_of_the_plan(
    demo_uri: str, demo_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(demo_uri, demo_corpus)
    told = forecast.plan(asked, RECORDS)
    steps = make_plans(Manifest.read(str(demo_corpus)), asked.corpus, asked.train).train.steps
    assert told["stage1"]["steps"] == asked.train.stage1_epochs * steps
    assert told["stage2"]["steps"] == asked.train.stage2_epochs * steps
    said = capsys.readouterr().out
    assert "379 to train on" in said
    assert "GFLOP/s a core, measured" in said


def test_obs_alone_tells_nearly_the_same(demo_uri: str, demo_corpus: Path, tmp_path: Path) -> None:
    """The demo's cells are cut at 128 genes of some 250: lengths differ by nothing."""
    prepared = forecast.plan(config(demo_uri, demo_corpus), RECORDS)
    drafted = forecast.plan(config(demo_uri, tmp_path / "none"), RECORDS)
    assert not (tmp_path / "none").exists()
    for stage in ("stage1", "stage2"):
        assert drafted[stage]["steps"] == prepared[stage]["steps"]
        assert drafted[stage]["flops_per_cell"] == pytest.approx(prepared[stage]["flops_per_cell"], rel=0.02)


@pytest.mark.parametrize("number", [1, 2])
def test_operations_are_those_of_a_real_step(demo_uri: str, demo_corpus: Path, number: int) -> None:
    """A forward of a micro-batch counts its own work, as training does."""
    asked = config(demo_uri, demo_corpus, model__text_train="all", objective__ctm_cells="null")
    drawn = forecast.draw(asked)
    told = forecast._stage(asked, drawn, number, None, forecast.Rate(1e9, ""), RECORDS)
    words, _ = forecast._words(drawn, asked)
    packed, _ = forecast.tokenise_texts(words, forecast.load_tokenizer("minilm"), asked.text.max_length)
    stage = forecast._model(asked, drawn, number, packed)
    _, batch = forecast._short_batches(drawn)
    work = Work(*stage(batch, 0)["work"].tolist())
    encoders = (stage.model.cell_bert.config, stage.model.text_bert.config, asked.model.projection)
    real = step_flops(work, *encoders).total / len(batch)
    # Here every cell has a text of its own, and now and then a pair is drawn twice.
    assert told.flops_per_cell == pytest.approx(real, rel=0.02 if number == 1 else 0.15)


def test_a_gpu_without_a_record_is_assumed_and_said_to_be(
    demo_uri: str, demo_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(demo_uri, demo_corpus, train__accelerator="A100-80G", train__num_workers=2)
    assumed = forecast.plan(asked, tmp_path)
    said = capsys.readouterr().out
    assert "MFU 40%, ASSUMED" in said
    assert "fits" in said
    assert "1 node of 8 GPUs" in said
    # A record of one is taken instead, the newest.
    stage = {"device": {"name": "NVIDIA A100-SXM4-80GB"}, "ours": {"mfu": 0.2}}
    record = {"date": "2026-01-02T", "figures": {"details": {"sizes": {"6x256": {"1": stage, "2": stage}}}}}
    (tmp_path / "step.jsonl").write_text(json.dumps(record) + "\n")
    measured = forecast.plan(asked, tmp_path)
    assert "MFU 20%, measured on NVIDIA A100-SXM4-80GB (2026-01-02)" in capsys.readouterr().out
    assert measured["stage1"]["hours"] == pytest.approx(2 * assumed["stage1"]["hours"])
    peak = peak_flops("A100")
    assert peak is not None
    rate = 2 * 0.2 * peak / measured["stage1"]["flops_per_cell"]
    assert measured["stage1"]["cells_per_s"] == pytest.approx(rate)


def test_what_does_not_fit_is_said(
    demo_uri: str, demo_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"model__cell_layers": 12, "model__cell_width": 512}
    large = {"train__micro_batch": 4096, "train__global_batch": 4096, "train__num_workers": 1}
    asked = config(demo_uri, demo_corpus, train__accelerator="A100-40G", **wide, **large)
    drawn = forecast.draw(config(demo_uri, demo_corpus))
    stage = forecast._stage(asked, drawn, 2, "A100-40G", forecast.Rate(1e12, ""), RECORDS)
    assert stage.memory.total > 43e9
    print(forecast._lines(asked, drawn, {1: stage, 2: stage}, "A100-40G", forecast.Rate(1e12, "")))
    assert "DOES NOT FIT. Lower --train.micro_batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train__accelerator": "V100"}, "train.accelerator: --plan knows A100-40G"),
        ({"train__global_batch": 512, "train__micro_batch": 256}, "fewer cells than one global batch"),
    ],
)
def test_what_cannot_be_is_refused(
    demo_uri: str, demo_corpus: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        forecast.plan(config(demo_uri, demo_corpus, **changed), RECORDS)
