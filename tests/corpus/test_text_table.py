"""What training holds of the texts: their tokens, and which terms are related."""

import numpy as np
import pytest
import torch

from langcell.corpus.text_table import load_text_table, related_terms, tokenise_texts
from langcell.corpus.texts import NAME, Texts, describe_obs, write_texts
from langcell.model.interop import load_tokenizer
from langcell.storage import open_root, write_file
from langcell.text.ontology import Ontology
from tests.corpus.test_texts import CD4, OPTIONS, ROWS, T, obs_of


@pytest.fixture(scope="module")
def ontology() -> Ontology:
    return Ontology.packaged()


@pytest.fixture(scope="module")
def described(ontology: Ontology) -> tuple[Texts, np.ndarray]:
    """The texts of 200 cells, and the index of each cell's."""
    cells = np.random.default_rng(0).integers(0, len(ROWS), 200)
    texts, text_of_cell, _ = describe_obs(obs_of(cells), ontology, OPTIONS)
    return texts, text_of_cell


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm")


def test_related_terms_are_ancestors_either_way(described, ontology):
    texts, _ = described
    related_CC = related_terms(texts)
    for i, a in enumerate(texts.terms):
        for j, b in enumerate(texts.terms):
            expected = a != b and (a in ontology.ancestors(b) or b in ontology.ancestors(a))
            assert related_CC[i, j] == expected, (a, b)
    assert related_CC[texts.terms.index(T), texts.terms.index(CD4)]
    assert related_CC.sum() == 2


def test_loaded_rows_are_the_tokens_of_each_variant(described, tokenizer, tmp_path, caplog):
    texts, text_of_cell = described
    write_file(open_root(str(tmp_path)), NAME, write_texts(texts))
    for max_length in (512, 24):
        caplog.clear()
        table = load_text_table(str(tmp_path), tokenizer, max_length)
        assert table.variants == 3
        words = [variant for variants in texts.variants for variant in variants]
        assert len(table.packed) == len(set(words))
        same_words = np.array(words)[:, None] == np.array(words)
        assert ((table.row_KV.ravel()[:, None] == table.row_KV.ravel()) == same_words).all()
        known = texts.term_index >= 0
        assert (table.term[known] == texts.term_index[known]).all()
        assert (table.term[~known] >= len(texts.terms)).all()
        n = len(texts.terms)
        assert torch.equal(table.related_CC[:n, :n], related_terms(texts))
        assert not table.related_CC[n:].any()
        index_B = table.index(texts.text_id[text_of_cell])
        for variant in range(table.variants):
            packed = table.packed.select(torch.from_numpy(table.row_KV[index_B[:20], variant]))
            for k in range(20):
                expected = tokenizer(
                    texts.variants[text_of_cell[k]][variant], truncation=True, max_length=max_length
                )["input_ids"]
                start, end = packed.cu_seqlens_B1[k : k + 2].tolist()
                assert packed.tokens_T[start:end].tolist() == expected
        n_cut = sum(len(tokenizer(v[0], verbose=False)["input_ids"]) > max_length for v in texts.variants)
        assert n_cut == (0 if max_length == 512 else 4)  # the text without a definition is short
        assert (f"{n_cut} of 5 texts are longer than {max_length} tokens" in caplog.text) == (n_cut > 0)


def test_cut_texts_keep_their_special_tokens_and_are_marked(tokenizer):
    texts = ["a cell", "lymphocyte " * 50, "a cell of the blood"]
    packed, cut = tokenise_texts(texts, tokenizer, 10)
    assert cut.tolist() == [False, True, False]
    assert packed.lengths_B.tolist()[1] == 10
    ends_B = packed.cu_seqlens_B1[1:].long() - 1
    assert (packed.tokens_T[packed.starts_B] == tokenizer.cls_token_id).all()
    assert (packed.tokens_T[ends_B] == tokenizer.sep_token_id).all()
