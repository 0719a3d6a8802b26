"""One stage as a Ray Train run, as often as it takes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import Tensor, nn

from langcell.corpus.blocks import row_groups
from langcell.corpus.manifest import Manifest
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan
from langcell.errors import InputError, Interrupted, RunError
from langcell.recipes.stopping import Stopping
from langcell.storage import open_root
from langcell.train.checkpoint import check_plan, read_weights
from langcell.train.liveness import COLLECTIVE_S
from langcell.train.loop import run_stage
from langcell.train.notice import SaveBeforeResize, make_notice, stop
from langcell.train.options import TrainOptions
from langcell.train.store import DamagedError, Record, Store
from langcell.train.task import Outcome, StageTask


@dataclass(frozen=True)
class Plans:
    """The order of the train split, and of the val split where it fills a global batch."""

    train: Plan
    val: Plan | None


@dataclass(frozen=True)
class Trained:
    """A stage's result: the checkpoint that is best by validation loss, or the last; its weights by name in
    the stage's module."""

    name: str
    record: Record
    weights: dict[str, Tensor]


def make_plans(manifest: Manifest, corpus: CorpusOptions, train: TrainOptions) -> Plans:
    """Raises InputError where the train split has fewer cells than one global batch."""

    def plan(split: str) -> Plan:
        return Plan(
            row_groups(manifest, split),
            seed=train.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            window_steps=corpus.window_steps,
            corpus_hash=manifest.hash,
        )

    trained, val = plan("train"), plan("val")
    if trained.steps == 0:
        raise InputError(
            f"fewer cells than one global batch: the train split of {corpus.dir} has {trained.cells} cells, "
            f"--train.global_batch is {train.global_batch}. Lower it, or widen --census.filter."
        )
    return Plans(trained, val if val.steps else None)


def use_gpus(options: TrainOptions) -> bool:
    """Whether workers take a GPU each: as told, else if PyTorch can use one and the cluster has enough."""
    if options.gpus is not None:
        return options.gpus
    least = options.min_workers or options.num_workers
    return torch.version.cuda is not None and ray.cluster_resources().get("GPU", 0) >= least


def worker_resources(options: TrainOptions, gpus: bool) -> dict[str, float]:
    """What Ray reserves for one worker."""
    return {"CPU": options.cpus_per_worker, **({"GPU": 1} if gpus else {}), **options.worker_resources}


def fit(task: StageTask, stopping: Stopping | None = None) -> Trained:
    """Run a stage, from its newest whole checkpoint where it has one; a finished one is not run again.

    stopping: what signals reach while it trains. Raises InputError for checkpoints of another corpus, order
    or batch, RunError where the stage cannot go on, and Interrupted where it was told to stop.
    """
    root = open_root(task.run_dir, "run.dir")
    root.create_dir("checkpoints", recursive=True)
    store = Store(root, task.stage)
    for _, record in store.committed():
        check_plan(record, task.plan.hash)
    if not _is_finished(store, task):
        stopping = stopping or Stopping()
        outcome = _train(task, stopping)
        if outcome.status == "failed":
            raise RunError(f"stage {task.stage}: {outcome.message}")
        if outcome.status == "stopped":
            raise Interrupted(f"stage {task.stage}, its checkpoint is committed")
        stopping.check()
    return _result(store)


def _is_finished(store: Store, task: StageTask) -> bool:
    """Whether the stage's last checkpoint is there, and whole: else its last steps are trained again."""
    for name, record in store.committed():
        if record.cursor.global_step == task.last_step:
            try:
                read_weights(store, name, record)
            except DamagedError:
                return False  # the workers say so, and take the one before
            return True
    return False


def _train(task: StageTask, stopping: Stopping) -> Outcome:
    options, gpus = task.train, use_gpus(task.train)
    workers = (
        options.num_workers if options.min_workers is None else (options.min_workers, options.num_workers)
    )
    notice = make_notice()
    with tempfile.TemporaryDirectory() as ray_dir:  # Ray Train keeps nothing of ours there
        trainer = TorchTrainer(
            run_stage,  # type: ignore[arg-type]  # it also returns something
            # By reference: the controller then imports nothing of what the task is made of.
            train_loop_config={"task": ray.put(replace(task, notice=notice))},
            torch_config=TorchConfig(
                backend="nccl" if gpus else "gloo", timeout_s=int(options.collective_timeout_s + COLLECTIVE_S)
            ),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # stubs are of the older API
                num_workers=workers,  # type: ignore[arg-type]
                elastic_resize_monitor_interval_s=options.resize_s,
                use_gpu=gpus,
                accelerator_type=options.accelerator if gpus else None,
                resources_per_worker=worker_resources(options, gpus),
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # likewise
                name=f"stage{task.stage}",
                storage_path=ray_dir,
                failure_config=FailureConfig(max_failures=options.max_failures),
                logging_config=LoggingConfig("WARNING"),  # two lines a report else; rank 0 says what matters
                callbacks=[SaveBeforeResize(notice)],  # type: ignore[list-item]
            ),
        )
        try:
            result = stopping.attend(trainer.fit, lambda: stop(notice))
        except TrainingFailedError as error:
            raise RunError(
                f"stage {task.stage}: workers failed more than train.max_failures ({options.max_failures}) "
                "times. What was committed stands: --run.resume true goes on from there. The last failure: "
                f"{error}"
            ) from error
    return result.return_value  # type: ignore[attr-defined]


def _result(store: Store) -> Trained:
    """Raises RunError where no checkpoint of a finished stage can be read."""
    for name, record in store.best():
        try:
            return Trained(name, record, read_weights(store, name, record))
        except DamagedError as error:
            print(f"checkpoint {name} is passed over, it is damaged: {error}", flush=True)
    raise RunError(f"no checkpoint in {store.folder} of the run directory can be read")


@torch.no_grad()
def whole_model(trained: Trained, model: nn.Module) -> None:
    """Set the trained weights of `model`; what was frozen keeps its value. Raises InputError for
    another's."""
    own = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for name, weight in trained.weights.items():
        if not name.startswith("model."):
            continue  # the temperature
        if name not in own or own[name].shape != weight.shape:
            raise InputError(f"checkpoint {trained.name} is of another model: {name} does not fit")
        own[name].copy_(weight)
