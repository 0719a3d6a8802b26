"""The training run: the options of the train room (standard library only)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainOptions:
    """Workers, batch, optimiser and cadence."""

    num_workers: int = 2
    """Ray Train workers (processes; one GPU each where `gpus` is on)."""
    min_workers: int | None = None
    """Least workers that a stage goes on with when nodes are lost (processes); it grows back to `num_workers` when they return. The batches stay the same. None: `num_workers`, and it waits for them."""
    resize_s: float = 60.0
    """Seconds between looks whether the cluster has room for more workers, where `min_workers` is given (s). Growing restarts the workers, from a checkpoint that they commit first."""
    gpus: bool | None = None
    """Whether each worker takes one GPU. None: if PyTorch is a CUDA build and the cluster has as many GPUs as workers (one that scaled to zero has none yet)."""
    accelerator: str | None = None
    """Kind of GPU that workers run on, by Ray's name (A100-40G, A100-80G, H100, ...): no other nodes are taken, and `--plan` reckons with it. None: any; `--plan` takes A100-40G."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that Ray reserves for a worker (a fraction leaves room for the data tasks on a laptop). 0 on nodes that show Ray no CPU, as the GPU nodes of cluster/ do."""
    worker_resources: dict[str, float] = field(default_factory=dict)
    """Other Ray resources that a worker takes, by name: keeps workers on the nodes that offer them."""
    global_batch: int = 256
    """G: cells of one optimiser step over all workers (cells)."""
    micro_batch: int = 128
    """B: cells of one lane's forward (cells); G / B lanes, at least one a worker. With several a worker, gradients accumulate and the contrastive batch stays G."""
    stage1_epochs: int = 3
    """Epochs of stage 1, masked genes and cell-cell contrast (epochs)."""
    stage2_epochs: int = 3
    """Epochs of stage 2, all four losses (epochs)."""
    lr: float = 1e-4
    """Peak learning rate of the cell side, cross-attention and matching head in stage 2 (per step)."""
    stage1_lr: float | None = None
    """Peak learning rate of stage 1 (per step). None: `lr`."""
    text_lr: float = 1e-5
    """Peak learning rate of the text encoder and its projection (per step)."""
    warmup_share: float = 0.1
    """Share of a stage's steps over which the rate rises linearly; a cosine to zero follows (0 to 1)."""
    weight_decay: float = 0.001
    """AdamW weight decay (per step), not applied to biases and norms."""
    clip: float = 1.0
    """Global gradient norm that gradients are clipped to (L2 norm); 0: they are not clipped."""
    zero: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1, 2 or 3."""
    offload: bool = False
    """Whether the optimiser's state (12 bytes a parameter) lives and is updated on the CPU, each rank its share."""
    activation_checkpointing: bool = False
    """Whether the encoders keep only what enters each layer and compute the rest again in the backward: less memory, a third more work."""
    compile: bool = False
    """Whether the encoders' layers are compiled (torch.compile). Off: on a CPU 6 layers of 256 were no faster in a trial, after minutes of compiling (attention runs uncompiled there, and the products bound the rest); on a GPU not measured."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`fp32`, `bf16`, or `auto` (bf16 on GPUs that have it, else fp32)."""
    seed: int = 0
    """Seed of weights, order, masks, draws and dropout (integer)."""
    checkpoint_epochs: int = 1
    """Epochs between checkpoints at an epoch's end, which have a validation loss (epochs); a stage's last epoch always has one."""
    checkpoint_steps: int = 0
    """Steps between checkpoints beside these (steps); 0: by time alone."""
    checkpoint_minutes: float = 15.0
    """Minutes after a checkpoint when the next one is made (min): what a failure costs at most. 0: not by time."""
    keep_last: int = 2
    """Newest checkpoints of a stage that are kept (count), beside the best by validation loss."""
    keep_epoch_ends: bool = False
    """Whether those of epoch ends are kept too (12 bytes a trainable parameter each)."""
    evaluate_epochs: int = 1
    """Epochs of stage 2 between zero-shot evaluations (epochs)."""
    profile: int = 0
    """Steps of each stage whose trace rank 0 writes to `profile/` in the run directory (count); 0: none. The stage's first three steps are left out."""
    max_failures: int = 8
    """Times that a stage is restarted from its last checkpoint after a worker died or hung (count); nodes that were preempted do not count. -1: without end."""
    collective_timeout_s: float = 600.0
    """Seconds that a step, or the wait for its data, may take (s); then the workers end, saying which of them is behind, and the stage is restarted."""
    skip_grad_norm: float = 1000.0
    """Gradient norm before clipping beyond which a step does not move the weights (L2 norm); 0: only where it, or a loss, is no number."""
    max_skipped: int = 10
    """Such steps in a row after which the run ends (count)."""
    deterministic: bool = False
    """Whether PyTorch may use deterministic kernels alone (slower on a GPU): the same workers then give the same losses to the last bit, resumed or not. On a CPU they do without it."""


@dataclass
class FitOptions:
    """Fine-tuning: epochs, batch and optimiser."""

    epochs: int = 10
    """Passes over the training cells (epochs)."""
    batch: int = 16
    """Cells of one optimiser step over all workers (cells)."""
    lr: float | None = None
    """Peak learning rate of weights that were trained before (per step). None: 5e-5 as Geneformer and LangCell-CE have it, 1e-5 for both encoders as LangCell's few-shot has it, 5e-4 for low-rank updates."""
    head_lr: float = 1e-3
    """Peak learning rate of a fresh head (per step)."""
    warmup_share: float = 0.1
    """Share of the steps over which the rate rises linearly; a linear fall to zero follows (0 to 1)."""
    weight_decay: float = 0.001
    """Decay of matrices; biases and norms have none (per step, times the learning rate)."""
    clip: float = 1.0
    """Norm that gradients are clipped at (L2 norm)."""
    batch_tokens: int = 16384
    """Most tokens of one forward, texts that are matched included (tokens); the gradients of a step's forwards are summed. A cell that is longer has one of its own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What products are computed in: `fp32`, `bf16`, or `auto` (bf16 on GPUs that have it, else fp32); weights are fp32."""
    seed: int = 0
    """Seed of the fresh weights, the order of cells and dropout (integer)."""
