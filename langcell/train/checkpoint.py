"""What a checkpoint holds: every trainable parameter whole, with its AdamW state, whoever held the pieces.

ZeRO cuts parameters and optimiser state in W pieces that depend on W; DeepSpeed's own files keep that cut, so
another W takes a conversion by way of disk, and they are pickles. Here each rank writes some parameters whole
(`weights-*`, `optimizer-*`, float32, safetensors): any W reads them, at any ZeRO stage, and a run that lost a
node goes on with what is left. What that costs, P trainable parameters in float32:

- saving: each is assembled on every rank by DeepSpeed's own calls, 3 all-reduces of 4 P bytes (2 where the
  weights are whole anyway), and copied to the CPU by the one rank that writes it: 12 P / W bytes each. For
  the paper's 0.3 B trainable parameters 3.6 GB cross the network, about a second beside steps of seconds;
  writing goes on in the background (`saver`).
- loading: every byte is read from storage once, whatever W, by the rank that verifies it, and broadcast.

Frozen parameters stand in no checkpoint: they are their starting checkpoint's (a locked MiniLM would be 90 MB
each). Nothing random is saved, for nothing random has a state; the learning rate is a function of the step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor, nn

from langcell.errors import InputError
from langcell.train.engine import optimizer_states
from langcell.train.store import DamagedError, Record, Store

MOMENTS = ("exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pieces:
    """What one rank writes: weights by name, and moments by `moment.name`; float32 on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(weight.shape) for name, weight in self.weights.items()}

    def serialised(self) -> Iterator[tuple[str, bytes]]:
        """The two files, one at a time: (kind, bytes)."""
        yield "weights", serialise(self.weights)
        yield "optimizer", serialise(self.moments)


def trainable(engine: DeepSpeedEngine) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by name in the engine's module."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def dealt(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Which names each rank writes: the largest first, each to the rank with the least so far."""
    load = [0] * ranks
    names: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        load[rank] += sizes[name]
        names[rank].append(name)
    return names


def capture(engine: DeepSpeedEngine) -> Pieces:
    """This rank's share of the state, copied to the CPU; a collective on every rank."""
    parameters = trainable(engine)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()}
    mine = set(dealt(sizes, dist.get_world_size())[dist.get_rank()])
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        whole = whole_weight(engine, parameter)
        states = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if name in mine:
            weights[name] = _on_cpu(whole)
            moments |= {f"{moment}.{name}": _on_cpu(state) for moment, state in states.items()}
    return Pieces(weights, moments)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().to("cpu", copy=True).contiguous()


def whole_weight(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor:
    """The float32 weight that the optimiser moves; at some stages a collective."""
    if engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32:
        return parameter  # stages 1 and 2 keep every parameter on every rank
    return safe_get_full_fp32_param(parameter)


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Trainable weights, whole, float32, on the CPU of every rank, by name in the engine's module."""
    return {name: _on_cpu(whole_weight(engine, p)) for name, p in trainable(engine).items()}


@dataclass(frozen=True)
class Held:
    """A checkpoint that was verified: this rank holds the files of the shards that it read, as bytes."""

    name: str
    record: Record
    files: dict[tuple[int, str], bytes]

    def tensors(self, kind: str, prefix: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `kind` whose name in the file is `prefix` and a parameter's, on every rank alike.

        A collective: each tensor is broadcast by the rank that holds it.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for index, shard in enumerate(self.record.shards):
            owner = index % ranks
            own = parse(self.files[index, kind]) if rank == owner else {}
            for name, shape in shard.shapes.items():
                if rank == owner:
                    tensor = own[prefix + name].to(device)
                else:
                    tensor = torch.empty(shape, dtype=torch.float32, device=device)
                dist.broadcast(tensor, owner)
                yield name, tensor


def find(store: Store, device: torch.device) -> Held | None:
    """The newest whole checkpoint, its files read once over all ranks; None where there is none.

    A collective. One that is damaged is passed over with a warning. Raises DamagedError where checkpoints
    stand but none of them is whole.
    """
    names: list[Any] = [store.names() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, 0)
    damaged: list[str] = []
    for name in names[0]:
        try:
            held = hold(store, name, ("weights", "optimizer"), device)
        except FileNotFoundError:
            continue  # never committed
        except DamagedError as error:
            damaged.append(name)
            if dist.get_rank() == 0:
                log.warning("checkpoint %s is passed over, it is damaged: %s", name, error)
        else:
            # Not before: where none is whole, the next start must say so too, and not begin anew.
            for name in damaged if dist.get_rank() == 0 else ():
                with contextlib.suppress(OSError):
                    store.set_aside(name)
            return held
    if damaged:
        raise DamagedError(
            f"no checkpoint in {store.folder} of the run directory is whole; restore one, or delete the "
            "folder to train the stage from its start"
        )
    return None


def hold(store: Store, name: str, kinds: tuple[str, ...], device: torch.device) -> Held:
    """Read and verify a checkpoint, each file by one rank. A collective.

    Raises, on every rank alike, FileNotFoundError where it was not committed, and DamagedError.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [store.record(name)]
        except DamagedError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, 0)
    record = told[0]
    if record is None:
        raise FileNotFoundError(f"{store.folder}/{name} was not committed")
    if isinstance(record, str):
        raise DamagedError(record)
    files, failure = {}, None
    try:
        for index in range(rank, len(record.shards), ranks):
            for kind in kinds:
                files[index, kind] = bytes(store.read(name, getattr(record.shards[index], kind)))
    except DamagedError as error:
        failure = str(error)
    failures: list[Any] = [None] * ranks
    dist.all_gather_object(failures, failure)
    found = [failure for failure in failures if failure is not None]
    if found:
        raise DamagedError("; ".join(found))
    return Held(name, record, files)


def check_plan(record: Record, plan: str) -> None:
    """Raises InputError for a checkpoint of another corpus, order or batch."""
    if record.cursor.plan != plan:
        raise InputError(
            "the checkpoint was made with another corpus, seed or batch: start a new run (--run.dir DIR), or "
            "give the settings of its config.yaml"
        )


def check_shapes(record: Record, module: nn.Module, what: str) -> None:
    """Raises InputError for a checkpoint of another model: a name that `module` lacks, or another shape."""
    own = {name: list(p.shape) for name, p in module.named_parameters()}
    shapes = {name: shape for shard in record.shards for name, shape in shard.shapes.items()}
    wrong = [name for name, shape in shapes.items() if own.get(name) != shape]
    if wrong:
        raise InputError(f"{what} is of another model: {', '.join(sorted(wrong)[:3])} do not fit")


@torch.no_grad()
def load_weights(held: Held, module: nn.Module) -> None:
    """Set the weights of a module that no engine has cut up yet. A collective. What the checkpoint lacks
    keeps its value. Raises InputError for another model's."""
    check_shapes(held.record, module, f"checkpoint {held.name}")
    parameters = dict(module.named_parameters())
    for name, tensor in held.tensors("weights", "", next(iter(parameters.values())).device):
        parameters[name].copy_(tensor)


@torch.no_grad()
def restore(engine: DeepSpeedEngine, held: Held) -> None:
    """Set the optimiser's state, and the float32 weights that it moves where the module's are bf16.

    A collective; the module has the weights already (`load_weights`). Raises InputError where the trainable
    parameters are not the checkpoint's.
    """
    parameters = trainable(engine)
    stored = {name for shard in held.record.shards for name in shard.shapes}
    if odd := stored ^ parameters.keys():
        raise InputError(
            f"checkpoint {held.name} is of another model: {', '.join(sorted(odd)[:3])} are trained in one of "
            "the two alone"
        )
    local = engine.zero_optimization_stage() == 3
    for name, tensor in held.tensors("weights", "", engine.device):
        if local:
            safe_set_local_fp32_param(parameters[name], _partition(parameters[name], tensor))
        else:
            safe_set_full_fp32_param(parameters[name], tensor)
    for moment in MOMENTS:
        for name, tensor in held.tensors("optimizer", f"{moment}.", engine.device):
            if local:
                piece = _partition(parameters[name], tensor)
                safe_set_local_optimizer_state(parameters[name], piece, moment)
            else:
                safe_set_full_optimizer_state(parameters[name], tensor, moment)
    for state in optimizer_states(engine):
        state["step"].fill_(held.record.updates)


def _partition(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's piece of a parameter at ZeRO 3: equal pieces, the last ones filled up with zeros."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = torch.nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)


def updates(engine: DeepSpeedEngine) -> int:
    """Optimiser steps that moved the weights: AdamW's own count."""
    return int(next(iter(optimizer_states(engine)))["step"])


def read_weights(store: Store, name: str, record: Record) -> dict[str, Tensor]:
    """Whole weights of a checkpoint in one process, by name in the stage's module. Raises DamagedError."""
    weights: dict[str, Tensor] = {}
    for shard in record.shards:
        weights |= parse(bytes(store.read(name, shard.weights)))
    return weights
