"""The DeepSpeed engine of one stage.

ZeRO 1, 2 and 3 are one number in the configuration, with the optimiser's state on the CPU by another;
the same AdamW, clipping and schedule run at each. What is pinned here and why: `gradient_clipping`
always (DeepSpeed clips at 1.0 where it is absent), PyTorch's own fused AdamW (DeepSpeed's would compile
C++ for a minute on first use), and no shared-memory CPU collectives (compiled likewise, and never used
by training).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from langcell.model.langcell import LangCell
from langcell.train.options import TrainOptions

PARTITIONS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""Where DeepSpeed keeps the float32 weights of a rank: ZeRO 1 and 2, its BF16_Optimizer, ZeRO 3."""


def use_bf16(options: TrainOptions, device: torch.device) -> bool:
    """Whether the engine computes in bf16: asked for, or `auto` on a GPU that has it."""
    if options.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return options.precision == "bf16"


def parameter_groups(
    module: nn.Module, lr: float, text_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: cell or text rate, with or without decay.

    The text rate holds for the text encoder and its projection; cross-attention is new and learns at
    the cell side's. Biases, norms and other vectors do not decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        text = (".text_bert." in name or ".text_proj." in name) and "crossattention" not in name
        groups.setdefault((text, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": text_lr if text else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (text, decays), parameters in groups.items()
    ]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose step is left out where `allowed` says so.

    DeepSpeed calls it once a partition, when it has the norm of the whole gradient: the same on every rank,
    and so the decision is. Weights, moments and count stay as they are; the gradient is thrown away.
    """

    allowed: Callable[[], bool] | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.allowed is None or self.allowed():
            super().step(closure)


def optimizer_states(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """AdamW's state of every flat partition that this rank holds (`step`, `exp_avg`, `exp_avg_sq`)."""
    return list(engine.optimizer.optimizer.state.values())


def _make_states(engine: DeepSpeedEngine) -> None:
    """Give AdamW its state, which it would make at its first step: a checkpoint may be loaded, or made,
    before."""
    zero = engine.optimizer
    (partitions,) = (getattr(zero, name) for name in PARTITIONS if hasattr(zero, name))
    for partition in partitions:
        zero.optimizer.state[partition] = {
            "step": torch.zeros((), dtype=torch.float32, device=partition.device),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()  # stages 1 and 2: where each parameter's lies


def zero_config(options: TrainOptions, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`: the stage, and where the optimiser's state lives."""
    config: dict[str, Any] = {"stage": options.zero}
    if options.offload:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return config


def build_engine(
    module: nn.Module,
    options: TrainOptions,
    *,
    lr: float,
    steps: int,
    device: torch.device,
    lanes: int = 1,
    done: int = 0,
) -> DeepSpeedEngine:
    """The engine around `module`, in an initialised process group.

    lr: peak rate of the cell side; steps: optimiser steps of the stage, for warm-up and cosine; lanes:
    micro-batches that a rank runs in a step, each one call, one backward and one `engine.step()`, the
    last of which moves the weights. The gradient is the mean over ranks and lanes. done: steps of the stage
    that lie behind, for the schedule.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for part in module.modules():
        if isinstance(part, LangCell):
            if options.activation_checkpointing:
                part.checkpoint_layers()
            if options.compile:
                part.compile_layers()
    optimizer = GuardedAdamW(parameter_groups(module, lr, options.text_lr, options.weight_decay), fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # From the schedule's second point on: at its first the rate is zero, a step that trains nothing.
    schedule = get_cosine_schedule_with_warmup(
        optimizer, max(1, int(options.warmup_share * steps)), steps + 1, last_epoch=done
    )
    bf16 = use_bf16(options, device)
    config = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": lanes,
        "gradient_clipping": options.clip,
        "zero_optimization": zero_config(options, device),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1 << 30,
    }
    if bf16 and lanes > 1:
        # A lane's gradient is small beside the sum of many, and bf16 has 8 bits.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=module.to(device),
        optimizer=optimizer,
        lr_scheduler=schedule,
        dist_init_required=False,
        config=config,
    )
    _make_states(engine)
    return engine
