"""Released weights become an export that annotates as they do, and an export goes there and back."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertTokenizerFast

from langcell.batch import Packed
from langcell.config import ConvertConfig
from langcell.errors import InputError
from langcell.inference.embed import embed_cells, embed_texts
from langcell.inference.pretrained import Pretrained
from langcell.model.langcell import LangCell
from langcell.model.official import save_official
from langcell.recipes.convert import run
from langcell.recipes.entry import INPUT_ERROR, later, main
from langcell.recipes.options import ConvertOptions, PlaceOptions

PRESET = Path(__file__).parents[2] / "jobs" / "configs" / "convert.yaml"
GENES = [f"ENSG{i:011d}" for i in range(1, 29)]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = [[30, 5, 9, 2], [30, 29]]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Released weights alone, and beside them what they were trained with."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cell", "type", ":"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    text = BertConfig(vocab_size=len(words), max_position_embeddings=32, **SHAPE)
    cell = BertConfig(vocab_size=31, max_position_embeddings=64, hidden_act="relu", **SHAPE)
    folder, tokenizer = tmp_path / "released", tmp_path / "tokenizer"
    model = LangCell(cell, text, 8, "cls").eval()
    save_official(model, folder, BertTokenizerFast(vocab=str(tmp_path / "words.txt")), {})
    tokenizer.mkdir()
    for file in ("config.json", "vocab.txt"):
        (folder / file).unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(tokenizer / file)
    for name, content in (
        ("tokens", {"<pad>": 0, "<mask>": 1, **{gene: i for i, gene in enumerate(GENES, 2)}}),
        ("medians", {gene: 0.5 + i for i, gene in enumerate(GENES)}),
        ("symbols", {f"SYM{i}": gene for i, gene in enumerate(GENES[:20])}),
    ):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    return folder


def _asked(released: Path, **changed: str | None) -> ConvertOptions:
    place = released.parent
    given: dict[str, str | None] = {
        "source": str(released),
        **{name: str(place / f"{name}.pkl") for name in ("tokens", "medians", "symbols")},
        "tokenizer": str(place / "tokenizer"),
    }
    return ConvertOptions(**{**given, **changed})  # type: ignore[arg-type]


def _convert(asked: ConvertOptions, directory: Path) -> Pretrained:
    summary = run(ConvertConfig(PlaceOptions(dir=str(directory)), asked))
    assert json.loads((directory / "summary.json").read_text()) == summary
    return Pretrained.from_pretrained(summary["export"], device="cpu")


def _embeddings(model: Pretrained) -> list[torch.Tensor]:
    texts = embed_texts(model.model, model.tokenizer, ["cell type: ", "cell"], model.text.max_length)
    return [embed_cells(model.model, Packed.from_sequences(SENTENCES), 100), texts]


def test_released_weights_become_an_export(released: Path, tmp_path: Path) -> None:
    model = _convert(_asked(released), tmp_path / "run")
    assert model.vocabulary.gene_ids == GENES
    assert (model.tau, model.organism, model.max_length) == (0.05, "homo_sapiens", 64)
    assert model.text.max_length == 32, "as many as it has positions"
    assert model.beta.feature_name == [f"SYM{i}" for i in range(20)] + [""] * 8
    assert model.known_types() == []
    assert (model.name, model.model.pooling) == ("run", "cls")
    assert "# released" in model.card
    assert (tmp_path / "run" / "export" / "cell_proj.safetensors").exists()
    back = _convert(ConvertOptions(str(tmp_path / "run" / "export"), layout="official"), tmp_path / "back")
    for name in ("cell_proj.bin", "text_bert/pytorch_model.bin", "cell_bert/pytorch_model.bin"):
        before, after = (torch.load(at / name) for at in (released, tmp_path / "back" / "export"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), name
    for a, b in zip(_embeddings(model), _embeddings(back), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_export_in_the_released_layout_needs_to_be_told_nothing(released: Path, tmp_path: Path) -> None:
    first = _convert(_asked(released), tmp_path / "a")
    there = _convert(ConvertOptions(str(tmp_path / "a" / "export"), layout="official"), tmp_path / "b")
    again = _convert(ConvertOptions(str(tmp_path / "b" / "export")), tmp_path / "c")
    assert there.config["official_code"]
    assert again.config == {**first.config, "layout": "safetensors"}
    assert again.beta.hash == first.beta.hash
    assert again.card == first.card
    for a, b in zip(_embeddings(first), _embeddings(again), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_belongs_to_other_weights_is_refused(released: Path, tmp_path: Path) -> None:
    fewer = {"<pad>": 0, "<mask>": 1, **{gene: i for i, gene in enumerate(GENES[:-1], 2)}}
    (tmp_path / "fewer.pkl").write_bytes(pickle.dumps(fewer))
    (tmp_path / "few.pkl").write_bytes(pickle.dumps(dict.fromkeys(GENES[1:], 1.0)))
    other = {name.replace("ENSG", "XLOC"): token for name, token in fewer.items()} | {"ENSG00000000001": 29}
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(other))
    (tmp_path / "loci.pkl").write_bytes(pickle.dumps({gene: 1.0 for gene in other if gene[0] != "<"}))
    for changed, message in (
        ({"tokens": None}, r"convert\.tokens.*Geneformer's"),
        ({"medians": None}, r"convert\.medians"),
        ({"tokens": str(tmp_path / "fewer.pkl")}, r"30 tokens, .*rows for 31"),
        ({"medians": str(tmp_path / "few.pkl")}, r"no median of 1 genes .*ENSG00000000001"),
        ({"tokens": str(tmp_path / "other.pkl"), "medians": str(tmp_path / "loci.pkl")}, "one organism"),
        ({"tokenizer": "minilm"}, r"30522 tokens, .*rows for 10"),
        ({"tokenizer": str(tmp_path / "nowhere")}, r"convert\.tokenizer: no tokenizer"),
        ({"source": None}, r"convert\.source"),
        ({"source": str(tmp_path / "nowhere")}, "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            _convert(_asked(released, **changed), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_model_that_pools_by_mean_and_a_full_folder_are_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text_pooling cls"):
        _convert(ConvertOptions(str(export), layout="official"), tmp_path / "run")
    model = Pretrained.from_pretrained(export, "cpu")
    stated = {"finetuned": {"kind": "classification", "target": "type"}}
    replace(model, config=model.config | stated).save_pretrained(tmp_path / "ce")
    with pytest.raises(InputError, match="was fine-tuned for classification of type"):
        _convert(ConvertOptions(str(tmp_path / "ce")), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty"):
        _convert(ConvertOptions(str(export), target=str(tmp_path / "full")), tmp_path / "run")
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_the_job_says_what_is_wrong(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(released / "text_bert")
    asked = vars(_asked(released))
    options = [f"--convert.{name}={value}" for name, value in asked.items() if value is not None]
    options += [f"--run.dir={tmp_path / 'run'}"]
    assert main(later("convert:run"), "", PRESET, options, tree=ConvertConfig) == INPUT_ERROR
    assert "text_bert" in capsys.readouterr().err
