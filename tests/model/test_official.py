"""The released layout: weights that others wrote, and the released forward over what we write.

The reference is written for this test alone: the cell encoder is transformers' own BertModel over a padded
batch, the text encoder BLIP's BERT spelled out over its state dict, with masks, one matrix at a time.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.model.interop import load_export, save_export
from langcell.model.langcell import LangCell
from langcell.model.official import load_official, save_official

CELL, TEXT, JOINT = 48, 32, 16
GENES, WORDS = 23, 14  # rows of the embeddings; <cls> is 22, [DEC] 12 and [ENC] 13
CELL_CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": GENES,
    "hidden_size": CELL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "relu",
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.02,
    "attention_probs_dropout_prob": 0.02,
}
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": WORDS,
    "hidden_size": TEXT,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "encoder_width": CELL,
    "add_cross_attention": True,
    "is_decoder": True,  # the released forward asks its argument, not this
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cell", "type", ":", "t", "b", ".", "a"]
SENTENCES = [[22, 5, 9, 2], [22, 3, 7, 11, 13, 2, 6, 19], [22, 21]]
TEXTS = [[2, 5, 6, 7, 8, 3], [2, 9, 5, 3], [2, 11, 8, 10, 10, 5, 9, 3]]


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=generator)


def _blip_state(seed: int) -> dict[str, Tensor]:
    """A text encoder's tensors by BLIP's names: cross-attention in each layer, no token types."""
    g, inner = torch.Generator().manual_seed(seed), TEXT_CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(TEXT_CONFIG["num_hidden_layers"]):
        for attention, width in (("attention", TEXT), ("crossattention", CELL)):
            at = f"encoder.layer.{layer}.{attention}"
            shapes |= {f"{at}.self.{name}": (TEXT, width) for name in ("key", "value")}
            shapes |= {f"{at}.self.query": (TEXT, TEXT), f"{at}.output.dense": (TEXT, TEXT)}
        shapes[f"encoder.layer.{layer}.intermediate.dense"] = (inner, TEXT)
        shapes[f"encoder.layer.{layer}.output.dense"] = (TEXT, inner)
    state = {
        "embeddings.word_embeddings.weight": _random(g, WORDS, TEXT),
        "embeddings.position_embeddings.weight": _random(g, 20, TEXT),
        "embeddings.position_ids": torch.arange(20)[None],
        "pooler.dense.weight": _random(g, TEXT, TEXT),
        "pooler.dense.bias": _random(g, TEXT),
    }
    for name, shape in shapes.items():
        state |= {f"{name}.weight": _random(g, *shape), f"{name}.bias": _random(g, shape[0])}
    norms = ["embeddings"] + [n.removesuffix(".dense") for n in shapes if n.endswith("output.dense")]
    for name in norms:
        state[f"{name}.LayerNorm.weight"] = 1 + _random(g, TEXT)
        state[f"{name}.LayerNorm.bias"] = _random(g, TEXT)
    return state


def _blip(
    state: dict[str, Tensor], ids_BL: Tensor, mask_BL: Tensor, context: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Last states [B, L, H] of the released text encoder; context: cell states and their mask."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + TEXT_CONFIG["layer_norm_eps"]).sqrt()
        return x * state[f"{name}.LayerNorm.weight"] + state[f"{name}.LayerNorm.bias"]

    def attend(x: Tensor, keys: Tensor, mask: Tensor, name: str) -> Tensor:
        heads = TEXT_CONFIG["num_attention_heads"]
        q, k, v = (
            linear(source, f"{name}.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, source in (("query", x), ("key", keys), ("value", keys))
        )
        scores = q @ k.mT / math.sqrt(TEXT // heads) + (1 - mask[:, None, None].float()) * -1e9
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return norm(linear(out, f"{name}.output.dense") + x, f"{name}.output")

    x = state["embeddings.word_embeddings.weight"][ids_BL]
    x = norm(x + state["embeddings.position_embeddings.weight"][: ids_BL.shape[1]], "embeddings")
    for layer in range(TEXT_CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        x = attend(x, x, mask_BL, f"{at}.attention")
        if context is not None:
            x = attend(x, *context, f"{at}.crossattention")
        inner = linear(x, f"{at}.intermediate.dense")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{at}.output.dense") + x, f"{at}.output")
    return x


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    return ids, torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])


@torch.no_grad()
def _released_forward(folder: Path) -> dict[str, Tensor]:
    """The released notebook over the files of `folder`: all states of the cells, embeddings, and both logits
    of every (cell, text), one candidate at a time."""

    def read(name: str) -> dict[str, Tensor]:
        return torch.load(folder / name, weights_only=True)

    def linear(x: Tensor, name: str) -> Tensor:
        head = read(f"{name}.bin")
        return x @ head["weight"].T + head["bias"]

    cell_bert = BertModel.from_pretrained(folder / "cell_bert").eval()
    text = read("text_bert/pytorch_model.bin")
    text = {name.removeprefix("module.").removeprefix("bert."): tensor for name, tensor in text.items()}
    cell_ids, cell_mask = _padded(SENTENCES)
    states = cell_bert(cell_ids, attention_mask=cell_mask).last_hidden_state
    text_ids, text_mask = _padded(TEXTS)
    logits = []
    for ids in TEXTS:
        one, mask = _padded([ids] * len(SENTENCES))
        logits.append(linear(_blip(text, one, mask, (states, cell_mask))[:, 0], "ctm_head"))
    return {
        "states": states[cell_mask.bool()],
        "z_c": F.normalize(linear(states[:, 0], "cell_proj"), dim=-1),
        "z_t": F.normalize(linear(_blip(text, text_ids, text_mask)[:, 0], "text_proj"), dim=-1),
        "logits": torch.stack(logits, 1),
    }


@torch.no_grad()
def _our_forward(model: LangCell) -> dict[str, Tensor]:
    cells, texts = Packed.from_sequences(SENTENCES), Packed.from_sequences(TEXTS)
    states = model.cell_states(cells)
    every = torch.arange(len(texts)).repeat(len(cells))
    pairs = model.match(states, cells, texts.select(every), torch.arange(len(cells)).repeat_interleave(3))
    return {
        "states": states,
        "z_c": model.project_cells(states, cells),
        "z_t": model.project_texts(texts),
        "logits": pairs.unflatten(0, (len(cells), len(texts))),
    }


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert theirs["logits"].std() > 0.1, "logits that differ, or the test sees nothing"


def _write(folder: Path, prefix: str = "", cell_format: str = "bin") -> Path:
    """The released layout with random weights."""
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(4)
    for name, config in (("cell_bert", CELL_CONFIG), ("text_bert", TEXT_CONFIG)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    cell = BertModel(BertConfig(**{**CELL_CONFIG, "initializer_range": 0.3})).state_dict()
    cell = {f"{prefix}{name}": tensor for name, tensor in cell.items()}
    if cell_format == "bin":
        torch.save(cell, folder / "cell_bert" / "pytorch_model.bin")
    else:
        save_file(cell, folder / "cell_bert" / "model.safetensors", metadata={"format": "pt"})
    text = {f"{prefix}{name}": tensor for name, tensor in _blip_state(5).items()}
    torch.save(text, folder / "text_bert" / "pytorch_model.bin")
    for name, shape in {
        "cell_proj": (JOINT, CELL),
        "text_proj": (JOINT, TEXT),
        "ctm_head": (2, TEXT),
    }.items():
        head = {"weight": _random(g, *shape), "bias": _random(g, shape[0])}
        torch.save(head, folder / f"{name}.bin")
    return folder


def _tokenizer(folder: Path) -> BertTokenizerFast:
    (folder / "words.txt").write_text("\n".join(VOCABULARY))
    return BertTokenizerFast(vocab=str(folder / "words.txt"))


def _fresh_model(pooling: str = "cls") -> LangCell:
    """A model of ours, its rows of token types as a trained one's: not zero."""
    torch.manual_seed(6)
    text = {name: v for name, v in TEXT_CONFIG.items() if name not in ("add_cross_attention", "is_decoder")}
    text |= {"vocab_size": len(VOCABULARY), "initializer_range": 0.3}
    cell = BertConfig(**{**CELL_CONFIG, "initializer_range": 0.3})
    return LangCell(cell, BertConfig(**text), JOINT, pooling).eval()


def _change(file: Path, **tensors: Tensor | None) -> None:
    state = torch.load(file, weights_only=True)
    for name, tensor in tensors.items():
        key = next((key for key in state if key.endswith(name.replace("__", "."))), name.replace("__", "."))
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    torch.save(state, file)


@pytest.mark.parametrize("prefix", ["", "module.", "bert.", "module.bert."])
def test_released_weights_give_the_released_forward(tmp_path: Path, prefix: str) -> None:
    model = load_official(_write(tmp_path / "released", prefix))
    assert not model.training
    assert model.pooling == "cls"
    _assert_same(_our_forward(model), _released_forward(_write(tmp_path / "plain")))


def test_a_cell_encoder_in_safetensors_loads_too(tmp_path: Path) -> None:
    folder = _write(tmp_path, cell_format="safetensors")
    _assert_same(_our_forward(load_official(folder)), _released_forward(folder))


def test_our_export_gives_the_same_under_the_released_forward(tmp_path: Path) -> None:
    model, config = _fresh_model(), {"pooling": "cls", "projection": JOINT, "tau": 0.07}
    save_export(model, tmp_path / "out", _tokenizer(tmp_path), {**config, "layout": "official"})
    ours = _our_forward(model)
    _assert_same(ours, _released_forward(tmp_path / "out"))
    loaded, stated = load_export(tmp_path / "out")
    _assert_same(_our_forward(loaded), ours)
    assert stated["tau"] == 0.07
    assert any("temperature" in line and "0.07" in line for line in stated["official_code"])
    assert any("joint space" in line and "16" in line for line in stated["official_code"])
    assert not any("text" in line for line in stated["official_code"])
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"cell_bert/pytorch_model.bin", "text_bert/config.json", "cell_proj.bin"} <= names
    assert not any(name.endswith("safetensors") for name in names)
    assert json.loads((tmp_path / "out" / "text_bert" / "config.json").read_text())["add_cross_attention"]


def test_the_tokenizer_knows_dec_and_enc_and_there_are_rows_for_them(tmp_path: Path) -> None:
    model, tokenizer = _fresh_model(), _tokenizer(tmp_path)
    save_official(model, tmp_path / "out", tokenizer, {})
    assert tokenizer.bos_token is None, "the caller's tokenizer stays as it is"
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.bos_token == "[DEC]"
    assert saved.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [12, 13]
    assert saved("a t cell")["input_ids"] == tokenizer("a t cell")["input_ids"] == [2, 11, 8, 5, 3]
    assert (tmp_path / "out" / "vocab.txt").read_text().split() == [*VOCABULARY, "[DEC]", "[ENC]"]
    rows = load_official(tmp_path / "out").text_bert.embeddings.word_embeddings.weight
    old = model.text_bert.embeddings.word_embeddings.weight
    assert torch.equal(rows[:12], old)
    torch.testing.assert_close(rows[12:], old.mean(0).expand(2, -1))


def test_rows_that_a_released_model_has_are_kept(tmp_path: Path) -> None:
    model = load_official(_write(tmp_path / "released"))
    save_official(model, tmp_path / "again", _tokenizer(tmp_path), {})
    before, after = (
        torch.load(tmp_path / name / "text_bert" / "pytorch_model.bin", weights_only=True)
        for name in ("released", "again")
    )
    assert after.keys() == {n for n in before if not n.startswith("pooler.") and "position_ids" not in n}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_pooling_by_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mean .*text_pooling cls"):
        save_official(_fresh_model("mean"), tmp_path, _tokenizer(tmp_path), {})


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("text_bert/pytorch_model.bin", {"1__crossattention__self__key__weight": None}, r"missing.*1\.cross"),
        (
            "text_bert/pytorch_model.bin",
            {"0__crossattention__self__key__weight": torch.zeros(32, 32)},
            "shape",
        ),
        ("cell_bert/pytorch_model.bin", {"word_embeddings__weight": torch.zeros(9, CELL)}, r"\[9, 48\]"),
        ("cell_bert/pytorch_model.bin", {"encoder__layer__2__x": torch.zeros(1)}, r"no place.*layer\.2\.x"),
        ("text_proj.bin", {"weight": torch.zeros(8, TEXT)}, r"text_proj.*weight: \[8, 32\] for \[16, 32\]"),
        ("cell_proj.bin", {"weight": None}, "cell_proj.bin has no tensor `weight`"),
        ("ctm_head.bin", {"bias": None}, r"ctm_head.*missing \['bias'\]"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, file: str, changed: dict[str, Tensor | None], message: str
) -> None:
    _change(_write(tmp_path) / file, **changed)
    with pytest.raises(InputError, match=message):
        load_official(tmp_path)


@pytest.mark.parametrize("file", ["cell_proj.bin", "ctm_head.bin", "text_bert/pytorch_model.bin"])
def test_a_pickle_with_code_a_torn_file_and_a_missing_one_are_refused(tmp_path: Path, file: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = _write(tmp_path / "released") / file
    whole = path.read_bytes()
    torch.save({"weight": Evil()}, path)
    with pytest.raises(InputError, match="more than tensors"):
        load_official(tmp_path / "released")
    path.write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    with pytest.raises(InputError, match="more than tensors"):
        load_official(tmp_path / "released")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_official(tmp_path / "released")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(InputError, match="no tensors by name"):
        load_official(tmp_path / "released")
    path.unlink()
    with pytest.raises(InputError, match=r"missing|neither"):
        load_official(tmp_path / "released")


def test_positions_of_another_kind_are_refused(tmp_path: Path) -> None:
    config = _write(tmp_path) / "text_bert" / "config.json"
    config.write_text(json.dumps({**TEXT_CONFIG, "position_embedding_type": "relative_key"}))
    with pytest.raises(InputError, match="relative_key"):
        load_official(tmp_path)


def test_bare_released_weights_are_no_export_yet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"released weights.*jobs/convert\.py"):
        load_export(_write(tmp_path))
