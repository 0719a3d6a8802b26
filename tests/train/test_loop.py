"""One stage under Ray Train: a killed worker changes nothing, every ZeRO stage runs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from langcell.cells.vocabulary import Vocabulary
from langcell.config import Config, parse
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from langcell.model.langcell import LangCell
from langcell.recipes.prepare import prepare_corpus
from langcell.recipes.training import fit, make_plans
from langcell.train import checkpoint, metrics
from langcell.train.loop import StageTask

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
TINY = ["--model.cell_layers", "1", "--model.cell_width", "32", "--objective.ctm_cells", "1"]


@pytest.fixture(scope="module")
def config(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small model on the demo's corpus, which stands prepared."""
    folder = tmp_path_factory.mktemp("loop")
    places = ["--corpus.dir", f"{folder}/corpus", "--census.dir", f"{folder}/census"]
    made = parse("", DEMO, [*places, *TINY])
    prepare_corpus(made)
    return made


def _task(config: Config, run_dir: Path, **changes: Any) -> StageTask:
    run_dir.mkdir()
    manifest = Manifest.read(config.corpus.dir)
    plans = make_plans(manifest, config.corpus, config.train)
    vocabulary = Vocabulary.from_json(Path(config.corpus.dir, "vocabulary.json").read_bytes())
    task = StageTask(
        stage=2, name="test", run_dir=str(run_dir), plan=plans.train, val_plan=plans.val, first_step=0,
        vocab_size=vocabulary.size, cell_length=config.tokens.max_length, text_length=config.text.max_length,
        short_share=config.text.short_share, init=None, model=config.model, objective=config.objective,
        train=replace(config.train, stage2_epochs=3, checkpoint_epochs=1, evaluate_epochs=2),
        corpus=config.corpus, evaluate=None,
    )  # fmt: skip
    return replace(task, **changes)


class KillOnce:
    """As the evaluation of epoch 2: kills its worker without warning, the first time it is called."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __call__(self, model: LangCell) -> dict[str, float]:
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return {}
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def _losses(run_dir: Path) -> list[tuple[float, ...]]:
    return [
        (row["step"], row["mgm"], row["cc"], row["ct"], row["ctm"], row["grad_norm"])
        for row in metrics.read(run_dir / metrics.METRICS)
    ]


@pytest.mark.slow
def test_a_killed_worker_changes_no_number(config: Config, tmp_path: Path) -> None:
    """SIGKILL in epoch 2, after its steps and before its checkpoint: the epoch is trained again from
    the checkpoint before, every step stands once, and the loss trace is the same to the last bit."""
    straight = _task(config, tmp_path / "straight", evaluate=None)
    best = fit(straight)
    killed = _task(config, tmp_path / "killed", evaluate=KillOnce(tmp_path / "marker"))
    best_of_killed = fit(killed)
    assert (tmp_path / "marker").exists()
    trace = _losses(tmp_path / "straight")
    assert [row[0] for row in trace] == list(range(3 * straight.plan.steps))
    assert _losses(tmp_path / "killed") == trace
    [recovery] = metrics.read(tmp_path / "killed" / metrics.RECOVERIES)
    assert recovery["step"] == recovery["steps_replayed"] == straight.plan.steps
    assert best.read_bytes() == best_of_killed.read_bytes()


@pytest.mark.slow
def test_zero_3_trains_validates_and_checkpoints(config: Config, tmp_path: Path) -> None:
    """At ZeRO 3 the losses are ZeRO 2's, and the checkpoint holds whole weights."""
    runs = {}
    for zero in (2, 3):
        task = _task(config, tmp_path / f"zero{zero}")
        train = replace(task.train, zero=zero, stage2_epochs=1)
        runs[zero] = fit(replace(task, train=train))
    two, three = (_losses(tmp_path / f"zero{zero}") for zero in (2, 3))
    for a, b in zip(two, three, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    weights = {zero: checkpoint.load_file(path) for zero, path in runs.items()}
    assert weights[2].keys() == weights[3].keys()
    for name, tensor in weights[2].items():
        assert weights[3][name].shape == tensor.shape, name


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    cursor = {"stage": 1, "epoch": 1, "step": 0, "global_step": 11, "plan": "aaaa"}
    (tmp_path / "cursor.json").write_text(json.dumps(cursor))
    with pytest.raises(InputError, match="another corpus, seed or batch"):
        checkpoint.load(None, tmp_path, plan="bbbb")  # type: ignore[arg-type]


def test_metrics_are_cut_back_and_the_cut_is_counted(tmp_path: Path) -> None:
    path = tmp_path / metrics.METRICS
    path.write_text(
        "".join(f'{{"step": {i}, "stage": 2, "time": {100 + i}}}\n' for i in range(5)) + '{"step": 5, "ti'
    )
    metrics.cut_back(tmp_path, 1, 0)
    assert [row["step"] for row in metrics.read(path)] == [0, 1, 2, 3, 4]
    assert path.read_text().endswith("\n"), "a half-written line would spoil the next one"
    metrics.cut_back(tmp_path, 2, 3)
    assert [row["step"] for row in metrics.read(path)] == [0, 1, 2]
    assert metrics.read(tmp_path / metrics.RECOVERIES) == [{"step": 3, "steps_replayed": 2, "stopped": 104}]
    metrics.cut_back(tmp_path, 2, 3)
    assert len(metrics.read(tmp_path / metrics.RECOVERIES)) == 1
