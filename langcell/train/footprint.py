"""How much memory a training worker takes, told before one is started.

Two parts. What ZeRO shards follows from the number of parameters, with the bytes that DeepSpeed holds for
each. What a backward needs is measured on the model itself and not modelled: forwards of a few short cells on
the CPU, in which every tensor that autograd saves is counted once. Nothing is padded and attention saves no
scores, so it is a line over tokens, drawn through two batches.

Held against the peaks of the record (`jobs/bench.py step`: float32 on a CPU, 6 cells of 1,332 tokens) it says
3.8 GB for stage 1 and 6.5 GB for stage 2, and 4.7 and 6.0 GB were measured. On a GPU nothing is measured yet:
leave a fifth of the memory free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langcell.batch import MicroBatch
from langcell.objective.stages import Stage
from langcell.train.options import TrainOptions

GPU_CONTEXT, LIBRARIES = 1.5e9, 0.9e9
"""What CUDA, NCCL and cuBLAS hold for themselves on a GPU, and the imported libraries on a CPU (bytes)."""
FRAGMENTS = 1.1
"""What an allocator holds for each byte in use."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker on its device at the peak of a step.

    weights, gradients, optimizer: as sharded; activations: what autograd saves in a micro-batch; logits:
    masked genes over the vocabulary, a chunk of them; context: the libraries' own.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    context: float

    @property
    def total(self) -> float:
        held = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return FRAGMENTS * held + self.context


def saved_bytes(stage: Stage, batch: MicroBatch) -> tuple[int, int]:
    """Bytes that autograd saves in a forward beside parameters: in float32, and in other types."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    seen: dict[int, tuple[bool, int]] = {}
    held: list[Tensor] = []  # else a freed storage's address could come back

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (tensor.dtype == torch.float32, storage.nbytes())
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        stage(batch, 0)
    floats = sum(size for is_float, size in seen.values() if is_float)
    return floats, sum(size for _, size in seen.values()) - floats


def footprint(
    stage: Stage,
    batches: tuple[MicroBatch, MicroBatch],
    *,
    tokens: float,
    genes: float,
    options: TrainOptions,
    workers: int,
    bf16: bool,
    gpu: bool,
) -> Footprint:
    """Of a worker of so many that runs `stage` on micro-batches of so many cell tokens.

    stage: on the CPU, in train mode, its layers checkpointed where the options say so; batches: of like
    composition, the second longer; genes: masked genes of a micro-batch; options: ZeRO stage, offload, lanes.
    """
    small, large = (batch.cells.tokens_T.numel() for batch in batches)
    times = (tokens - small) / (large - small)
    floats, others = (
        a + times * (b - a) for a, b in zip(*(saved_bytes(stage, b) for b in batches), strict=True)
    )
    all_parameters = sum(parameter.numel() for parameter in stage.parameters())
    trained = sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    vocabulary = stage.model.cell_bert.config.vocab_size
    lanes = options.global_batch // options.micro_batch
    several = lanes > workers

    def shard(size: float, zero: int) -> float:
        return size / workers if options.zero >= zero else size

    number = 2 if bf16 else 4
    gradient = 4 if several else number  # accumulated in float32
    return Footprint(
        weights=shard(number * all_parameters, 3),
        gradients=shard(gradient * trained, 2),
        optimizer=0.0 if options.offload else shard(12 * trained, 1),
        activations=floats * number / 4 + others,
        logits=min(genes, stage.options.mgm_chunk) * vocabulary * (number + 8),
        context=GPU_CONTEXT if gpu else LIBRARIES,
    )
