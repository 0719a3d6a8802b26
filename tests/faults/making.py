"""A run small enough to be killed many times: 69 steps of the embedded cells, in a fraction of a second each.

Four lanes of four cells, so that one, two or three workers train the same batches; one epoch of stage 1 and
two of stage 2; a checkpoint every four steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from langcell.cells.vocabulary import Vocabulary
from langcell.config import Config, parse
from langcell.corpus.manifest import Manifest
from langcell.recipes.training import Trained, fit, make_plans
from langcell.storage import open_root
from langcell.train import metrics, trace
from langcell.train.task import StageTask

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
TINY = {
    # The product's own layout, of several row groups: the demo's is one.
    "corpus.row_group_cells": "128",
    "corpus.window_steps": "128",
    # Adam makes whole steps of gradients that are rounding alone, and other numbers of workers round
    # otherwise: at the demo's 1e-3 that grew to 6e-5 of a loss in 69 steps.
    "train.lr": "2e-4",
    "model.cell_layers": "1",
    "model.cell_width": "32",
    "objective.ctm_cells": "1",
    "train.micro_batch": "4",
    "train.stage1_epochs": "1",
    "train.stage2_epochs": "2",
    "train.evaluate_epochs": "9",
    "train.checkpoint_steps": "4",
    "train.max_failures": "2",
    "train.collective_timeout_s": "60",
    "train.deterministic": "true",
}
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
}
"""A node is given up after seconds instead of a minute."""
STEPS, EPOCH = 69, 23
TEXT = "text"
"""Where in a tiny run's folder its text encoder lies (`tests.small_text`)."""
LOSSES = ("mgm", "cc", "ct", "ctm", "grad_norm")


def argv(folder: Path, **changed: Any) -> list[str]:
    """Options of a tiny run whose corpus lies in `folder`; `train__seed=1` changes one."""
    places = {"corpus.dir": "corpus", "census.dir": "census", "model.text_init": TEXT}
    options = {name: f"{folder}/{place}" for name, place in places.items()} | TINY
    options |= {name.replace("__", "."): str(value) for name, value in changed.items()}
    return [f"--{name}={value}" for name, value in options.items()]


class Tiny:
    """The prepared corpus of tiny runs, and what there is to ask of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, run_dir: Path | str, **changed: Any) -> Config:
        return parse("", DEMO, argv(self.folder, run__dir=run_dir, **changed))

    def tasks(self, run_dir: Path | str, **train: Any) -> tuple[StageTask, StageTask]:
        """Both stages of a run that nobody resumes by a job."""
        config = self.config(run_dir)
        config = replace(config, train=replace(config.train, **train))
        manifest = Manifest.read(config.corpus.dir)
        plans = make_plans(manifest, config.corpus, config.train)
        vocabulary = Vocabulary.from_json(Path(config.corpus.dir, "vocabulary.json").read_bytes())
        first = StageTask(
            stage=1, name="tiny", run_dir=str(run_dir), plan=plans.train, val_plan=plans.val, first_step=0,
            vocab_size=vocabulary.size, cell_length=config.tokens.max_length,
            text_length=config.text.max_length, short_share=config.text.short_share, init=None,
            model=config.model, objective=config.objective, train=config.train, corpus=config.corpus,
            evaluate=None,
        )  # fmt: skip
        return first, replace(first, stage=2, first_step=first.last_step)

    @staticmethod
    def losses(run_dir: Path | str) -> list[tuple[Any, ...]]:
        """Every step that stands in the record, with its losses."""
        rows = metrics.read(open_root(str(run_dir)), metrics.METRICS)
        return [(row["step"], *(row[name] for name in LOSSES if name in row)) for row in rows]

    @staticmethod
    def seen(run_dir: Path | str) -> pa.Table:
        """Every cell that the weights have seen, by step and joinid."""
        root = open_root(str(run_dir))
        parts = [
            pq.read_table(path, filesystem=root) for stage in (1, 2) for path, *_ in trace.files(root, stage)
        ]
        return pa.concat_tables(parts).sort_by([("step", "ascending"), ("soma_joinid", "ascending")])

    @staticmethod
    def recoveries(run_dir: Path | str) -> list[dict[str, Any]]:
        return metrics.read(open_root(str(run_dir)), metrics.RECOVERIES)

    @staticmethod
    def assert_once(run_dir: Path | str) -> None:
        """Every cell of each epoch's plan stands once in the trace, and every step once in the metrics."""
        rows = Tiny.seen(run_dir)
        step, joinid = rows["step"].to_numpy(), rows["soma_joinid"].to_numpy()
        for epoch in range(STEPS // EPOCH):
            cells = joinid[step // EPOCH == epoch]
            assert len(cells) == len(np.unique(cells)) == EPOCH * 16
        assert [row[0] for row in Tiny.losses(run_dir)] == list(range(STEPS))


@dataclass(frozen=True)
class Straight:
    """A run that nothing disturbed, and what came of it."""

    run_dir: Path
    trained: Trained


def train(tiny: Tiny, run_dir: Path, **options: Any) -> Trained:
    """Both stages, in the Ray that this process is connected to."""
    first, second = tiny.tasks(run_dir, **options)
    return fit(replace(second, init=fit(first).name))


def same(run_dir: Path, straight: Straight, trained: Trained | None = None) -> None:
    """A run has the record, the cells, the draws and the weights of the undisturbed one, to the last bit."""
    assert Tiny.losses(run_dir) == Tiny.losses(straight.run_dir)
    Tiny.assert_once(run_dir)
    assert Tiny.seen(run_dir).equals(Tiny.seen(straight.run_dir))
    if trained is not None:
        assert trained.name == straight.trained.name
        assert trained.weights.keys() == straight.trained.weights.keys()
        for name, weight in straight.trained.weights.items():
            assert weight.equal(trained.weights[name]), name


def last_step(run_dir: Path) -> int:
    """The last step that stands in the record."""
    path = run_dir / metrics.METRICS
    return path.read_text().count("\n") - 1 if path.exists() else -1


@contextmanager
def watched(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """`act` runs beside the block, until its end is set."""
    done = threading.Event()
    thread = threading.Thread(target=act, args=(done,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
