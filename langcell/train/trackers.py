"""A run's figures in TensorBoard, MLflow or Weights & Biases, by their own libraries.

What stands in metrics.jsonl goes to each tracker of `run.trackers` too, step by step, under the same names.
A tracker lives in a thread of its own: a server that does not answer holds up no step (MLflow's client alone
tries for minutes, while every rank would wait), and one that fails ends no run. Both stages, and what resumes
them, write to one run of the tracker, whose id stands in `trackers/` of the run directory. Steps that are
trained again after an interruption replace the first ones where the library can do that (TensorBoard), and
are left out where it cannot.

Where MLflow and W&B write, and as whom, their own environment variables say, on the node of rank 0.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from pyarrow import fs

from langcell.errors import InputError, refuse_secrets
from langcell.storage import absolute, read_file, write_file

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What `pip install` makes each of them work."""
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
FOLDER = "trackers"
MOST_WAITING = 1000
"""Rows that wait for a tracker that is slow; those that come then are left out."""
CLOSING_S = 30.0
"""How long a stage's end waits for what is still to be sent."""
NO_FIGURES = ("step", "time")


@dataclass(frozen=True)
class Tracking:
    """Which trackers a run has, by which name, and what it was told (the resolved configuration)."""

    names: Sequence[str] = ()
    run: str = ""
    params: dict[str, Any] = field(default_factory=dict)


def check(names: Sequence[str]) -> None:
    """Raises InputError for a tracker whose package, or address, is missing or wrong here."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise InputError(
                f"run.trackers: {name} needs a package that is not installed: pip install {PACKAGES[name]} "
                "(on a cluster in the image of its nodes)."
            )
    if "mlflow" not in names:
        return
    if (uri := os.environ.get("MLFLOW_TRACKING_URI")) is None:
        raise InputError(
            "run.trackers: mlflow needs MLFLOW_TRACKING_URI in the environment of the job and of its nodes; "
            "its default is a folder of whatever node a worker happens to run on."
        )
    try:
        refuse_secrets("run.trackers", uri)
    except InputError:
        raise InputError(
            "run.trackers: MLFLOW_TRACKING_URI must hold no credentials, for MLflow's messages repeat it. "
            "Give them by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        ) from None


class Tracker(Protocol):
    """What a library is asked for, in its thread."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...
    def publish(self) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """All trackers of a run, for one stage; on rank 0.

    root: filesystem of the run directory `run_dir`; first_step: global step that the stage goes on from.
    """

    def __init__(self, tracking: Tracking, root: fs.FileSystem, run_dir: str, first_step: int) -> None:
        kinds: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(tracking, root, run_dir, first_step),
            "mlflow": lambda: MLflow(tracking, root),
            "wandb": lambda: WandB(tracking, root, run_dir),
        }
        self._feeds = [_Feed(name, kinds[name]) for name in dict.fromkeys(tracking.names)]

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        figures = {
            name: float(value) for name, value in row.items() if value is not None and name not in NO_FIGURES
        }
        for feed in self._feeds:
            feed.put(lambda tracker: tracker.log(row["step"], figures))

    def publish(self) -> None:
        """A checkpoint was committed: what it goes on from shall be in the trackers too."""
        for feed in self._feeds:
            feed.put(lambda tracker: tracker.publish())

    def close(self) -> None:
        for feed in self._feeds:
            feed.close()


class _Feed:
    """A tracker behind a thread, which opens it, too."""

    def __init__(self, name: str, opened: Callable[[], Tracker]) -> None:
        self._name, self._open, self._told = name, opened, set[str]()
        self._waiting = queue.Queue[Callable[[Tracker], None] | None](MOST_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[Tracker], None] | None) -> None:
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            self._say("is too slow", "")

    def close(self) -> None:
        self.put(None)
        self._thread.join(CLOSING_S)

    def _run(self) -> None:
        tracker = None
        while True:
            work = self._waiting.get()
            try:
                if tracker is None:
                    tracker = self._open()
                if work is None:
                    return tracker.close()
                work(tracker)
            except Exception as error:  # whatever a library or its server says, training goes on
                self._say("failed", f" ({type(error).__name__}: {error})")
                if work is None:
                    return None

    def _say(self, what: str, why: str) -> None:
        """Once: each step of a long outage would fail alike."""
        if what not in self._told:
            self._told.add(what)
            print(
                f"run.trackers: {self._name} {what}{why}; each step is tried, and some may be missing there "
                "(metrics.jsonl has all)",
                flush=True,
            )


class TensorBoard:
    """Event files in `tensorboard/` of the run directory: written there where it is a folder, uploaded before
    each checkpoint where it is a URI."""

    def __init__(self, tracking: Tracking, root: fs.FileSystem, run_dir: str, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._root = root
        self._held = tempfile.TemporaryDirectory() if "://" in run_dir else None
        self._folder = self._held.name if self._held else f"{absolute(run_dir)}/tensorboard"
        # Files are named by second and host alone, and one of the same second would be overwritten; they are
        # read in the order of their names.
        ending = f".{time.time_ns()}"
        self._writer = SummaryWriter(
            self._folder, purge_step=first_step, flush_secs=10, filename_suffix=ending
        )
        config = yaml.safe_dump(tracking.params, sort_keys=False)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()), first_step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def publish(self) -> None:
        self._writer.flush()  # but for figures that its own thread has not taken yet: they come next time
        self._upload()

    def close(self) -> None:
        self._writer.close()
        self._upload()

    def _upload(self) -> None:
        if self._held is not None:
            self._root.create_dir("tensorboard", recursive=True)
            fs.copy_files(self._folder, "tensorboard", destination_filesystem=self._root)


class MLflow:
    """One run on the server of MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, tracking: Tracking, root: fs.FileSystem) -> None:
        import mlflow

        self._mlflow = mlflow
        known = _id_of(root, "mlflow")
        mlflow.end_run()  # one that a try before this began, and could not go on with
        run = mlflow.start_run(run_id=known, run_name=None if known else tracking.run)
        _keep_id(root, "mlflow", run.info.run_id)
        self._last = run.data.metrics.get("step", -1)
        if not run.data.params:
            mlflow.log_params(flat(tracking.params))

    def log(self, step: int, figures: dict[str, float]) -> None:
        if step > self._last:  # a value that was logged cannot be replaced: the step would have two
            self._mlflow.log_metrics({"step": step, **figures}, step=step)

    def publish(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """One run of W&B; its environment says where (WANDB_PROJECT, WANDB_MODE, ...)."""

    def __init__(self, tracking: Tracking, root: fs.FileSystem, run_dir: str) -> None:
        import wandb

        self._wandb = wandb
        known = _id_of(root, "wandb") or uuid.uuid4().hex
        _keep_id(root, "wandb", known)
        local = None if "://" in run_dir or "WANDB_DIR" in os.environ else absolute(run_dir)
        self._run = wandb.init(
            id=known,
            resume="allow",
            name=tracking.run,
            config=tracking.params,
            dir=local,
            settings=wandb.Settings(console="off"),  # a worker's output is Ray's
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)  # W&B leaves out steps that it has

    def publish(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process has written all only then, and this one may be ended any time


def flat(params: dict[str, Any]) -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`, the names that overrides have."""
    return {f"{room}.{name}": value for room, options in params.items() for name, value in options.items()}


def _id_of(root: fs.FileSystem, name: str) -> str | None:
    try:
        return read_file(root, str(Path(FOLDER, name))).decode()
    except FileNotFoundError:
        return None


def _keep_id(root: fs.FileSystem, name: str, known: str) -> None:
    root.create_dir(FOLDER, recursive=True)
    write_file(root, str(Path(FOLDER, name)), known.encode())
