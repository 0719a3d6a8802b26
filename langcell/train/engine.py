"""The DeepSpeed engine of one stage.

ZeRO 1, 2 and 3 are one number in the configuration; the same AdamW, clipping and schedule run at
each. What is pinned here and why: `gradient_clipping` always (DeepSpeed clips at 1.0 where it is
absent), PyTorch's own AdamW (DeepSpeed's would compile C++ for a minute on first use), and no
shared-memory CPU collectives (compiled likewise, and never used by training).
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from langcell.train.options import TrainOptions


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


def build_engine(
    module: nn.Module, options: TrainOptions, *, lr: float, steps: int, device: torch.device
) -> DeepSpeedEngine:
    """The engine around `module`, in an initialised process group.

    lr: peak rate of the cell side; steps: optimiser steps of the stage, for warm-up and cosine.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        parameter_groups(module, lr, options.text_lr, options.weight_decay), fused=device.type == "cuda"
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # From the schedule's second point on: at its first the rate is zero, a step that trains nothing.
    schedule = get_cosine_schedule_with_warmup(
        optimizer, max(1, int(options.warmup_share * steps)), steps + 1, last_epoch=0
    )
    engine, *_ = deepspeed.initialize(
        model=module.to(device),
        optimizer=optimizer,
        lr_scheduler=schedule,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": options.micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": options.clip,
            "zero_optimization": {"stage": options.zero},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": use_bf16(options, device)},
            "steps_per_print": 1 << 30,
        },
    )
    return engine
