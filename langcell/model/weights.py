"""Foreign checkpoints, read without running what they may hold.

safetensors first, `.bin` only with `weights_only=True` (a pickle that holds code is refused by PyTorch).
What is missing, misshapen or unreadable is named, never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig
from transformers.utils import cached_file

from langcell.errors import InputError

SHOWN = 3
"""Names of tensors that a message shows."""


def load_config(path: str, key: str) -> BertConfig:
    """The BERT configuration at a folder or Hub id. Raises InputError if it is none."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: no model configuration at {path}: {error}") from error
    if config.model_type != "bert":
        raise InputError(f"{key}: {path} is a {config.model_type} model; a BERT is needed.")
    return config


def load_state(path: str, key: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder or Hub id. Raises InputError if there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        except OSError:
            file = None
        if file is not None:
            # Checkpoints converted from TensorFlow call a norm's weight and bias gamma and beta.
            return {
                name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                    "LayerNorm.beta", "LayerNorm.bias"
                ): tensor
                for name, tensor in read_tensors(file).items()
            }
    raise InputError(f"{key}: {path} holds neither model.safetensors nor pytorch_model.bin.")


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, or of a `.bin` that `torch.save` wrote, on the CPU.

    Raises InputError for a file that is missing, damaged, or holds anything but tensors by name.
    """
    try:
        if str(file).endswith(".safetensors"):
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    except Exception as error:  # a damaged archive or pickle raises whatever its reader runs into
        raise InputError(
            f"{file} is damaged, or holds more than tensors, which is not loaded "
            f"(weights_only): {str(error).splitlines()[0] if str(error) else repr(error)}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{file} holds no tensors by name, as a module's state_dict")
    return state


def load_into(module: nn.Module, state: dict[str, Tensor], source: str, new: Collection[str] = ()) -> None:
    """Set the parameters of `module` by name; those whose names contain a word of `new` may be absent.

    Raises InputError, naming `source`, for others that are missing and for shapes that do not fit.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not any(word in name for word in new)]
    wrong = [
        f"{name}: {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or wrong:
        raise InputError(
            f"checkpoint {source} does not fit: missing {missing[:SHOWN] or 'nothing'}, "
            f"wrong shape {wrong[:SHOWN] or 'none'}"
        )
    module.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
