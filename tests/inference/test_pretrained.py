"""A trained model is read whole or not at all, and knows what it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from langcell.batch import Packed
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError
from langcell.inference.embed import embed_cells, embed_texts
from langcell.inference.pretrained import Pretrained


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def test_what_is_saved_is_read_again(export: Path, tmp_path: Path) -> None:
    model = Pretrained.from_pretrained(export)
    model.save_pretrained(tmp_path / "again")
    again = Pretrained.from_pretrained(tmp_path / "again")
    cells = Packed.from_sequences([[model.vocabulary.cls, 5, 9, 2], [model.vocabulary.cls, 700]])
    texts = ["cell type: B cell. A lymphocyte; ", "cell type: neuron; "]
    assert torch.equal(embed_cells(model.model, cells, 100), embed_cells(again.model, cells, 100))
    a, b = (embed_texts(m.model, m.tokenizer, texts, m.text.max_length) for m in (model, again))
    assert torch.equal(a, b)
    assert again.beta.hash == model.beta.hash
    assert again.vocabulary.gene_ids == model.vocabulary.gene_ids
    assert again.types.equals(model.types)
    assert again.config == model.config
    assert not again.model.training


def test_a_model_is_not_saved_over_another(export: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="copy is not empty"):
        Pretrained.from_pretrained(export).save_pretrained(copy)


def test_an_export_is_called_by_its_run(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "blood" / "export")
    assert Pretrained.from_pretrained(tmp_path / "blood" / "export").name == "blood"


def test_parts_of_two_models_are_refused(copy: Path) -> None:
    genes = Vocabulary.read(str(copy / "vocabulary.json")).gene_ids
    Vocabulary([*genes[1:], genes[0]]).write(str(copy / "vocabulary.json"))
    with pytest.raises(InputError, match="put together of two models"):
        Pretrained.from_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    del config["vocabulary_hash"]
    (copy / "config.json").write_text(json.dumps(config))
    Vocabulary(genes[1:]).write(str(copy / "vocabulary.json"))
    with pytest.raises(InputError, match=r"767 tokens, its cell encoder 768"):
        Pretrained.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "cell_proj.safetensors", "vocabulary.json", "beta.parquet"])
def test_a_missing_part_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=name.split(".")[0]):
        Pretrained.from_pretrained(copy)


def test_a_folder_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make demo"):
        Pretrained.from_pretrained(tmp_path / "nowhere")


def test_known_types_are_narrowed_by_tissue_and_its_parts(export: Path) -> None:
    model = Pretrained.from_pretrained(export)
    assert len(model.known_types()) == 10
    assert model.known_types(["blood"]) == model.known_types(["UBERON:0000178"]) == model.known_types()
    assert model.known_types(["haemolymphatic fluid"]) == model.known_types(), "blood is one"
    with pytest.raises(InputError, match=r"no cell type of lung. It knows: blood"):
        model.known_types(["lung"])
    with pytest.raises(InputError, match="no name or id of a tissue"):
        model.known_types(["lunge"])
