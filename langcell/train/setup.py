"""A worker made ready: texts, model and engine, as they were at the newest whole checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
from deepspeed import DeepSpeedEngine

from langcell.batch import MicroBatch, TextTable
from langcell.corpus.microbatch import micro_batch
from langcell.corpus.text_table import load_text_table
from langcell.model.interop import build_model, load_tokenizer
from langcell.objective.lanes import Lanes
from langcell.objective.stages import Stage
from langcell.storage import open_root
from langcell.train import checkpoint as ckpt
from langcell.train.engine import build_engine
from langcell.train.store import Cursor, Store
from langcell.train.task import StageTask


@dataclass(frozen=True)
class Ready:
    """What a stage is trained with, and where it goes on."""

    texts: TextTable
    lanes: Lanes
    engine: DeepSpeedEngine
    cursor: Cursor
    seed: int

    def micro_batches(self, rows: pa.Table, epoch: int, short_share: float) -> list[MicroBatch]:
        """Rows of the stream as the engine takes them, on its device."""
        return [
            micro_batch(
                rows.slice(i, 1), self.texts, epoch=epoch, short_share=short_share, seed=self.seed
            ).to(self.engine.device)
            for i in range(len(rows))
        ]


def make_deterministic() -> None:
    """Deterministic kernels alone, in this process; before CUDA and NCCL are used for the first time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault(
        "NCCL_ALGO", "Ring"
    )  # the order of a sum must not hang on what NCCL finds best today
    torch.use_deterministic_algorithms(True)
    # Else every buffer that DeepSpeed allocates, 2 GB of gradients a backward, is filled with NaN first: a
    # step of a toy model took 6 s instead of 0.25.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def make_ready(task: StageTask, store: Store, device: torch.device, alive: Callable[[], None]) -> Ready:
    """alive: called between its parts. A collective. Raises, on every rank alike, InputError for a checkpoint
    of another model or corpus, and DamagedError where there are checkpoints and none is whole."""
    found = ckpt.find(store, device)
    if found is not None:
        ckpt.check_plan(found.record, task.plan.hash)
    alive()
    texts = load_text_table(task.corpus.dir, load_tokenizer(task.model.text_init), task.text_length)
    lanes = Lanes.here(task.plan.lanes)
    model = build_model(task.model, task.vocab_size, task.cell_length, task.train.seed)
    source, objective = found, task.objective
    if found is None and task.init is not None:
        before = Store(open_root(task.run_dir, "run.dir"), task.stage - 1)
        source = ckpt.hold(before, task.init, ("weights",), device)
    if source is not None:
        objective = replace(objective, tau=source.record.tau)
    stage = Stage(
        model,
        objective,
        stage=task.stage,
        cls=task.vocab_size - 1,
        seed=task.train.seed,
        text_train=task.model.text_train,
        texts=texts.to(device),
    )
    alive()
    stage.to(device)
    if source is not None:
        ckpt.load_weights(source, stage)
    if task.stage == 2 and stage.text_locked:
        stage.pool_table()
    alive()
    done = 0 if found is None else found.record.cursor.global_step - task.first_step
    engine = build_engine(
        stage,
        task.train,
        lr=task.lr,
        steps=task.epochs * task.plan.steps,
        device=device,
        lanes=lanes.each,
        done=done,
    )
    if found is not None:
        ckpt.restore(engine, found)
        cursor = found.record.cursor
    else:
        cursor = Cursor(task.stage, 0, 0, task.first_step, task.plan.hash)
    return Ready(texts, lanes, engine, cursor, task.train.seed)
