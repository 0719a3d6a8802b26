"""One stage as a Ray Train run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from langcell.corpus.blocks import row_groups
from langcell.corpus.manifest import Manifest
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan
from langcell.errors import InputError
from langcell.train.checkpoint import WEIGHTS
from langcell.train.loop import StageTask, run_stage
from langcell.train.options import TrainOptions


@dataclass(frozen=True)
class Plans:
    """The order of the train split, and of the val split where it fills a global batch."""

    train: Plan
    val: Plan | None


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
    return torch.version.cuda is not None and ray.cluster_resources().get("GPU", 0) >= options.num_workers


def fit(task: StageTask) -> Path:
    """Run a stage; the `model.safetensors` of its best checkpoint (by validation loss, else the last).

    A run of the same directory goes on from its last checkpoint; a finished one is not trained again.
    """
    gpus = use_gpus(task.train)
    scored = task.val_plan is not None
    trainer = TorchTrainer(
        run_stage,  # type: ignore[arg-type]
        train_loop_config=task,  # type: ignore[arg-type]
        torch_config=TorchConfig(
            backend="nccl" if gpus else "gloo", timeout_s=int(task.train.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=task.train.num_workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": task.train.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name=f"stage{task.stage}",
            storage_path=str((Path(task.run_dir) / "checkpoints").absolute()),
            failure_config=FailureConfig(max_failures=task.train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,
                checkpoint_score_attribute="val_loss" if scored else None,
                checkpoint_score_order="min",
            ),
        ),
    )
    result = trainer.fit()
    best = result.get_best_checkpoint("val_loss", "min") if scored else result.checkpoint
    assert best is not None, "a stage ends with a checkpoint"
    return Path(best.path) / WEIGHTS
