import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langcell.batch import Packed
from langcell.inference.embed import embed_cells, embed_texts, inferring, spans, tokenize


@given(st.lists(st.integers(1, 40)), st.integers(1, 60))
def test_spans_cover_everything_once_and_none_can_be_longer(lengths, budget):
    runs = list(spans(np.array(lengths, np.int64), budget))
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(lengths)))
    for start, stop in runs:
        assert stop == start + 1 or sum(lengths[start:stop]) <= budget
        assert stop == len(lengths) or sum(lengths[start : stop + 1]) > budget


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_embeddings_do_not_depend_on_the_batches(toy, budget):
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 50, n) for n in rng.integers(1, 30, 17)]
    model = toy.Model()
    alone = torch.cat([embed_cells(model, Packed.from_sequences([cell]), 10_000) for cell in cells])
    torch.testing.assert_close(embed_cells(model, Packed.from_sequences(cells), budget), alone)
    texts = ["short", "a longer text", "the longest text of all of them"]
    alone = torch.cat([embed_texts(model, toy.Tokenizer(), [text], 20) for text in texts])
    torch.testing.assert_close(embed_texts(model, toy.Tokenizer(), texts, 20, budget), alone)


def test_tokens_are_cut_and_no_texts_are_no_tokens(toy):
    packed = tokenize(toy.Tokenizer(), ["abcdef", "ab"], 4)
    assert packed.tokens_T.tolist() == [ord(c) % 50 for c in "abcdab"]
    assert packed.cu_seqlens_B1.tolist() == [0, 4, 6]
    assert len(tokenize(toy.Tokenizer(), [], 4)) == 0
    assert len(embed_texts(toy.Model(), toy.Tokenizer(), [], 4)) == 0


def test_the_mode_of_each_module_comes_back_even_after_an_error(toy):
    model = toy.Model().train()
    model.locked.eval()
    with inferring(model):
        assert not model.training
        assert torch.is_inference_mode_enabled()
    assert model.training
    assert not model.locked.training
    with pytest.raises(IndexError):  # a token outside the vocabulary: the model itself fails
        embed_cells(model, Packed.from_sequences([[99]]), 10)
    assert model.training
    assert not torch.is_inference_mode_enabled()
