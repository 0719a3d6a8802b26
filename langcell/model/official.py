"""The layout of LangCell's released weights, in and out.

    cell_bert/     config.json, pytorch_model.bin: Hugging Face's BertModel
    text_bert/     config.json, pytorch_model.bin: the BERT of BLIP, with `crossattention` in every layer
    cell_proj.bin  text_proj.bin  ctm_head.bin: one linear layer each

The forward is ours: bidirectional in both passes of the text encoder whatever its config says of a decoder,
texts begin with [CLS], and the pair's answer is the state of [CLS]. ([DEC] and [ENC] are BLIP's; LangCell
gives them rows and no use.) One thing differs: BLIP's embeddings have no token types. A released text
encoder therefore gets rows of zeros for them, and of ours, in which every token is of type 0, that row is
added to the positions: the same sums.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedTokenizerBase

from langcell.errors import InputError
from langcell.model.langcell import LangCell
from langcell.model.text_encoder import text_config
from langcell.model.weights import SHOWN, load_config, load_into, load_state, read_tensors

LAYOUT = "official"
"""`layout` of the config.json of an export in this layout."""
HEADS = ("cell_proj", "text_proj", "ctm_head")
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
WORDS = "embeddings.word_embeddings.weight"
TAU, PROJECTION, CELL_LENGTH, TEXT_LENGTH = 0.05, 256, 2048, 512
"""What the released code has written into it: temperature, width of the joint space, most tokens of a cell
and of a text."""
_NOT_OURS = ("pooler.", "cls.", "embeddings.position_ids")
"""Tensors that a released encoder may hold and its forward does not use."""


def is_official(directory: Path) -> bool:
    """Whether the folder holds weights in the released layout."""
    return (directory / f"{HEADS[0]}.bin").is_file()


def load_official(directory: str | Path) -> LangCell:
    """The released layout as a model in evaluation mode; `pooling` is `cls`.

    Names may begin with `module.` and `bert.`; widths come from the configurations, that of the joint space
    from cell_proj.bin. Raises InputError for a file that is missing or unsafe, and for tensors that are
    missing, misshapen or unknown, by name.
    """
    directory = Path(directory)
    heads = {name: read_tensors(directory / f"{name}.bin") for name in HEADS}
    if "weight" not in heads["cell_proj"]:
        raise InputError(f"{directory / 'cell_proj.bin'} has no tensor `weight`, as a linear layer's")
    cell, text = (_bert_config(directory / name) for name in ("cell_bert", "text_bert"))
    model = LangCell(cell, text_config(text, cell.hidden_size), len(heads["cell_proj"]["weight"]), "cls")
    states = {name: _bare_state(directory / name) for name in ("cell_bert", "text_bert")}
    types = model.text_bert.embeddings.token_type_embeddings.weight
    states["text_bert"][TYPES] = torch.zeros_like(types)
    for name, state in {**states, **heads}.items():
        module, source = getattr(model, name), str(directory / name)
        load_into(module, state, source)
        if unknown := sorted(state.keys() - module.state_dict().keys()):
            raise InputError(
                f"checkpoint {source} does not fit: it holds {len(unknown)} tensors that its configuration "
                f"has no place for: {unknown[:SHOWN]}"
            )
    return model.eval()


def save_official(
    model: LangCell, directory: Path, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> None:
    """Write the released layout into `directory`, with the tokenizer and `config.json`.

    The tokenizer gets [DEC] (bos) and [ENC], the text encoder rows for them where it has none (the mean of
    the others). config: as of `interop.save_export`; its copy says under `official_code` where the released
    code, run as it stands, would compute something else. Raises InputError for a model that pools by mean,
    which that code cannot.
    """
    if model.pooling != "cls":
        raise InputError(
            f"layout official: the released code projects the state of [CLS], this model the {model.pooling} "
            "of its states: it would give other embeddings. Keep `safetensors`, or train with "
            "--model.text_pooling cls."
        )
    tokenizer = _with_blip_tokens(tokenizer)
    text = _plain(model.text_bert.state_dict())
    text[POSITIONS] = text[POSITIONS] + text.pop(TYPES)[0]
    text[WORDS] = _with_rows(text[WORDS], len(tokenizer))
    text_bert = BertConfig.from_dict(model.text_bert.config.to_dict())
    text_bert.update({"vocab_size": len(text[WORDS]), "add_cross_attention": True})
    encoders = {
        "cell_bert": (model.cell_bert.config, _plain(model.cell_bert.state_dict())),
        "text_bert": (text_bert, text),
    }
    for name, (bert, state) in encoders.items():
        bert.save_pretrained(directory / name)
        torch.save(state, directory / name / "pytorch_model.bin")
    for name in HEADS:
        torch.save(_plain(getattr(model, name).state_dict()), directory / f"{name}.bin")
    tokenizer.save_pretrained(directory)
    # What the released code's tokenizer reads; ids are lines.
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: word[1])
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    stated = {**config, "layout": LAYOUT, "official_code": _differences(model, config)}
    (directory / "config.json").write_text(json.dumps(stated, indent=2))


def _bert_config(folder: Path) -> BertConfig:
    config = load_config(str(folder), LAYOUT)
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise InputError(f"{LAYOUT}: {folder} has positions of type {kind}; absolute ones are needed.")
    # The released forward looks at neither: cross-attention is where a cell is given, nothing is causal.
    config.is_decoder = config.add_cross_attention = False
    return config


def _bare_state(folder: Path) -> dict[str, Tensor]:
    state = {
        name.removeprefix("module.").removeprefix("bert."): tensor
        for name, tensor in load_state(str(folder), LAYOUT).items()
    }
    return {name: tensor for name, tensor in state.items() if not name.startswith(_NOT_OURS)}


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own on the CPU: what shares memory would be written whole."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _with_blip_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    # One after the other, as BLIP does: their ids are its own, 30522 and 30523 of PubMedBERT.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def _with_rows(words_VH: Tensor, rows: int) -> Tensor:
    """At least so many rows, new ones the mean of those there are."""
    new = max(0, rows - len(words_VH))
    return torch.cat([words_VH, words_VH.mean(dim=0, keepdim=True).expand(new, -1)])


def _differences(model: LangCell, config: dict[str, Any]) -> list[str]:
    """What the released code takes for granted and this model has otherwise."""
    found = {
        "temperature (`/ 0.05` in the notebook)": (config.get("tau", TAU), TAU),
        "width of the joint space (`proj_dim=256`)": (model.cell_proj.out_features, PROJECTION),
        "most tokens of a cell (`[:2048]` in the collator)": (
            config.get("max_length", CELL_LENGTH),
            CELL_LENGTH,
        ),
        "most tokens of a text (`max_length=512`)": (
            config.get("text", {}).get("max_length", TEXT_LENGTH),
            TEXT_LENGTH,
        ),
    }
    return [f"{what}: {ours} here" for what, (ours, theirs) in found.items() if ours != theirs]
