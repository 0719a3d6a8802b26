"""Token ids are Geneformer's with <cls> after the last gene, and survive the disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import MASK, PAD, Vocabulary
from langcell.errors import InputError


def test_layout() -> None:
    vocabulary = Vocabulary(["E1", "E2", "E3"])
    assert (PAD, MASK, vocabulary.cls, vocabulary.size) == (0, 1, 5, 6)
    tokens = vocabulary.tokens_of(["E3", "nothing", "E1", "E2", "E3"])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [4, 0, 2, 3, 4]


def test_the_genes_of_a_corpus_are_those_it_has_in_a_cell() -> None:
    beta = np.array([1, np.nan, 2, 3], np.float32)
    genes = ["E1", "E2", "E3", "E4"]
    medians = Beta(genes, genes, np.array([5, 0, 1, 0]), beta)
    assert Vocabulary.from_beta(medians).gene_ids == ["E1", "E3"]


def test_medians_of_others_make_no_vocabulary() -> None:
    medians = Beta(["E1"], [""], np.array([0]), np.ones(1, np.float32))
    with pytest.raises(InputError, match=r"tokens\.vocabulary"):
        Vocabulary.from_beta(medians)


def test_ids_must_fit_16_bits() -> None:
    genes = [f"E{i}" for i in range(65_534)]
    largest = Vocabulary(genes[:-1])
    assert largest.cls == 65_535
    assert largest.tokens_of([genes[-2]])[0] == 65_534
    with pytest.raises(InputError, match="65,533"):
        Vocabulary(genes)


def test_a_gene_stands_once() -> None:
    with pytest.raises(InputError, match="E2 stands 2 times"):
        Vocabulary(["E1", "E2", "E3", "E2"])


def test_file_comes_back(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["E1", "E2"])
    path = str(tmp_path / "vocabulary.json")
    vocabulary.write(path)
    assert json.loads(Path(path).read_text())["special"] == {"<pad>": 0, "<mask>": 1, "<cls>": 4}
    assert Vocabulary.load(path) == vocabulary
    assert Vocabulary.load(f"file://{path}") == vocabulary
    root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert Vocabulary.read("vocabulary.json", root) == vocabulary
    assert Vocabulary(["E2", "E1"]).hash != vocabulary.hash


def test_damage_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    Vocabulary(["E1", "E2"]).write(str(path))
    path.write_text(path.read_text().replace("E2", "E3"))
    with pytest.raises(InputError, match="damaged"):
        Vocabulary.read(str(path))
    for text in ("", "[]", '{"gene_ids": ["E1"]}', "\x00\xff"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"not a vocabulary\.json"):
            Vocabulary.read(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        Vocabulary.read(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "token_of",
    [
        {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "E1": 5},
        {"<pad>": 0, "<mask>": 1, "<eos>": 2, "<cls>": 3, "E1": 4},
        {"<pad>": 0, "<mask>": 1, "<cls>": 2, "E1": 3},
        {"<pad>": 0, "<mask>": 1, "E1": 3},
        {"<mask>": 0, "<pad>": 1, "E1": 2},
        {"E1": 0, "E2": 1},
        {"<pad>": 0, "<mask>": 1, "E1": 2, "E2": 2},
        {"<pad>": 0, "<mask>": 1, "E1": "2"},
        {},
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, token_of: dict[str, object]) -> None:
    path = tmp_path / "tokens.pkl"
    path.write_bytes(pickle.dumps(token_of))
    with pytest.raises(InputError, match="no token dictionary of Geneformer"):
        Vocabulary.load(str(path))


def test_the_genes_of_geneformer_v2_are_numbered_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "tokens.pkl"
    token_of = {"E7": 6, "E9": 4, "<cls>": 2, "<pad>": 0, "E8": 5, "<eos>": 3, "<mask>": 1}
    path.write_bytes(pickle.dumps(token_of))
    vocabulary = Vocabulary.load(str(path))
    assert vocabulary == Vocabulary(["E9", "E8", "E7"])
    assert vocabulary.tokens_of(["E9", "E7"]).tolist() == [2, 4]
    assert (vocabulary.cls, vocabulary.size) == (5, len(token_of) - 1)
    assert vocabulary.renumbered
    assert Vocabulary.from_json(vocabulary.to_json()).hash == Vocabulary(["E9", "E8", "E7"]).hash
    del token_of["<cls>"], token_of["<eos>"]
    path.write_bytes(pickle.dumps({gene: token - 2 * (token > 1) for gene, token in token_of.items()}))
    assert not Vocabulary.load(str(path)).renumbered


def test_geneformer_dictionary_loads(shared: Path) -> None:
    vocabulary = Vocabulary.load(str(shared / "geneformer" / "token_dictionary.pkl"))
    assert len(vocabulary.gene_ids) == 25_424
    assert vocabulary.cls == 25_426  # as LangCell extends it
    with open(shared / "geneformer" / "token_dictionary.pkl", "rb") as file:
        published = pickle.load(file)
    genes = vocabulary.gene_ids[::97]
    assert vocabulary.tokens_of(genes).tolist() == [published[gene] for gene in genes]
