"""What a checkpoint holds: DeepSpeed shards, the cursor, and whole float32 weights.

`deepspeed/` is the training state of every rank; `cursor.json` says where the run stands and what
it was a run of; `model.safetensors` holds the trained parameters whole, in float32, so that the next
stage and the export need neither DeepSpeed nor a pickle. Frozen parameters stand in neither: they
are their starting checkpoint's (a locked MiniLM would be 90 MB a checkpoint).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from langcell.errors import InputError

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: the next step is `step` of `epoch` of `stage`; and what it is a run of."""

    stage: int
    epoch: int
    step: int
    global_step: int
    plan: str
    """Hash of the plan: corpus, order, batch."""


def save(engine: DeepSpeedEngine, directory: Path, cursor: Cursor) -> None:
    """Write a checkpoint into `directory`; every rank calls it, each writes its own shards."""
    engine.save_checkpoint(str(directory), tag="deepspeed", exclude_frozen_parameters=True)
    weights = whole_weights(engine.module.model, engine)
    tau = float(engine.module.temperature(engine.device).detach())
    if torch.distributed.get_rank() == 0:
        save_file(weights, directory / WEIGHTS, metadata={"tau": repr(tau)})
        (directory / "cursor.json").write_text(json.dumps(asdict(cursor)))


def load(engine: DeepSpeedEngine, directory: Path, plan: str) -> Cursor:
    """Restore the training state. Raises InputError if it belongs to another corpus, order or batch."""
    cursor = read_cursor(directory)
    if cursor.plan != plan:
        raise InputError(
            f"the checkpoint {directory} was made with another corpus, seed or batch: start a new run "
            "(--run.dir DIR), or give the settings of its config.yaml"
        )
    engine.load_checkpoint(str(directory), tag="deepspeed", load_module_strict=False)
    return cursor


def read_cursor(directory: Path) -> Cursor:
    """The cursor of a checkpoint."""
    return Cursor(**json.loads((directory / "cursor.json").read_text()))


def whole_weights(module: nn.Module, engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Trainable parameters, whole, in float32, on the CPU; a collective at every ZeRO stage."""
    weights = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            whole = safe_get_full_fp32_param(parameter)
        else:
            # Stages 1 and 2 keep every parameter on every rank; in bf16 the float32 master is sharded.
            whole = parameter if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
        weights[name] = whole.detach().float().cpu().clone()
    return weights


def read_tau(path: Path) -> float:
    """The temperature that belongs to whole weights."""
    with safe_open(path, framework="pt") as file:
        return float(file.metadata()["tau"])


def load_weights(module: nn.Module, path: Path) -> None:
    """Load whole weights into a module that is not yet partitioned; what they lack keeps its value.

    Raises InputError for a name or shape that the module does not have.
    """
    own = module.state_dict()
    weights = load_file(path)
    wrong = [name for name, w in weights.items() if name not in own or own[name].shape != w.shape]
    if wrong:
        raise InputError(f"{path} is of another model: {', '.join(wrong[:3])} do not fit")
    module.load_state_dict(weights, strict=False)
