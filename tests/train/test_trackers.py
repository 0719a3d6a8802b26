"""Trackers get every step once, across stages and resumes, and none of them can hold up or end a run.

TensorBoard's files are read back as TensorBoard reads them; MLflow and W&B are the real libraries, where they
are installed, on a folder and offline.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from langcell.config import parse
from langcell.errors import InputError
from langcell.storage import open_root
from langcell.train import trackers
from langcell.train.trackers import Trackers, Tracking

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
PARAMS = {"train": {"lr": 0.001, "zero": 2}, "run": {"trackers": ["mlflow"]}}


def feed(tool: str, run_dir: str, steps: range) -> None:
    """What rank 0 does from `steps.start` on; a step's loss tells which time it was trained."""
    tracked = Trackers(Tracking([tool], "name", PARAMS), open_root(run_dir), run_dir, steps.start)
    for step in steps:
        tracked.log({"step": step, "time": 1.5e9, "mgm": step + steps.start / 100, "mfu": None})
    tracked.publish()
    tracked.close()


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(InputError, match=r"run\.trackers"):
        parse("", DEMO, ["--run.trackers=[tensorboard,comet]"])
    assert parse("", DEMO, ["--run.trackers=[tensorboard,wandb]"]).run.trackers == ["tensorboard", "wandb"]


def test_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.MODULES, "wandb", "langcell_has_no_such_module")
    with pytest.raises(InputError, match=r"run\.trackers: wandb .* pip install wandb"):
        trackers.check(["tensorboard", "wandb"])


def test_mlflow_needs_an_address_and_no_password_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.MODULES, "mlflow", "json")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        trackers.check(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:wJalrXUtnFEMI@127.0.0.1:5000")
    with pytest.raises(InputError, match="must hold no credentials") as refused:
        trackers.check(["mlflow"])
    assert "wJalr" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    trackers.check(["mlflow"])


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "URI"])
def test_tensorboard_shows_what_was_trained_last(tmp_path: Path, scheme: str) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    feed("tensorboard", f"{scheme}{tmp_path}", range(6))
    feed("tensorboard", f"{scheme}{tmp_path}", range(4, 8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["mgm"], "no time, and nothing that is null"
    logged = [(event.step, event.value) for event in events.Scalars("mgm")]
    assert logged == [(s, pytest.approx(s + (0.04 if s >= 4 else 0))) for s in range(8)]
    (text,) = events.Tensors("config/text_summary")[:1]
    assert b"lr: 0.001" in text.tensor_proto.string_val[0]


def test_mlflow_goes_on_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "blood")
    feed("mlflow", str(tmp_path), range(6))
    feed("mlflow", str(tmp_path), range(4, 8))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("blood")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("name", "FINISHED")
    assert run.data.params == {"train.lr": "0.001", "train.zero": "2", "run.trackers": "['mlflow']"}
    logged = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "mgm")]
    assert logged == [(s, pytest.approx(s + (0.04 if s >= 6 else 0))) for s in range(8)], "a step stands once"


def test_wandb_writes_offline_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    feed("wandb", str(tmp_path), range(6))
    feed("wandb", str(tmp_path), range(6, 8))
    known = (tmp_path / "trackers" / "wandb").read_text()
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{known}.wandb"
    assert b"mgm" in first.read_bytes()
    assert b"mgm" in second.read_bytes()


class Fake:
    """A library that fails, or does not answer."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.broken, self.hangs = True, threading.Event()

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.steps.append(step)

    def publish(self) -> None:
        self.hangs.wait(60)

    def close(self) -> None:
        self.steps.append(-1)


def track(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Any) -> Trackers:
    monkeypatch.setattr(trackers, "WandB", lambda *_: fake)
    return Trackers(Tracking(["wandb"]), open_root(str(tmp_path)), str(tmp_path), 0)


def test_tracker_that_fails_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    tracked = track(monkeypatch, tmp_path, fake)
    for step in range(3):
        tracked.log({"step": step, "mgm": 1.0})
    while (told := capsys.readouterr().out) == "":
        time.sleep(0.01)
    while not tracked._feeds[0]._waiting.empty():
        time.sleep(0.01)
    fake.broken = False
    tracked.log({"step": 3, "mgm": 1.0})
    tracked.close()
    assert fake.steps == [3, -1]
    assert "wandb failed (ConnectionError: no route to host)" in told
    assert (told + capsys.readouterr().out).count("run.trackers:") == 1


def test_tracker_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "CLOSING_S", 0.2)
    fake = Fake()
    tracked = track(monkeypatch, tmp_path, fake)
    began = time.monotonic()
    tracked.publish()
    for step in range(2 * trackers.MOST_WAITING):
        tracked.log({"step": step, "mgm": 1.0})
    tracked.close()
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.count("run.trackers: wandb is too slow") == 1
    fake.hangs.set()
