"""Packed encoders against transformers' own BERT, sequence by sequence."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from langcell.batch import Packed
from langcell.model.langcell import LangCell
from langcell.model.packed import encode

CELL = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=40, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0,
)  # fmt: skip
TEXT = BertConfig(
    vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48,
    max_position_embeddings=30, hidden_dropout_prob=0.1,
)  # fmt: skip


def _packed(lengths: list[int], vocab: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    return Packed.from_sequences(
        [torch.randint(2, vocab, (n,), generator=generator).numpy() for n in lengths]
    )


@pytest.fixture
def model() -> LangCell:
    torch.manual_seed(0)
    return LangCell(CELL, TEXT, projection=16, pooling="cls").eval()


def _sequences(packed: Packed) -> list[torch.Tensor]:
    return list(packed.tokens_T.split(packed.lengths_B.tolist()))


@pytest.mark.parametrize("lengths", [[7, 7, 7], [1, 12, 5, 5, 40, 2], [3]])
def test_packed_states_equal_bert_one_by_one(model: LangCell, lengths: list[int]) -> None:
    packed = _packed(lengths, 50)
    plain = BertModel(BertConfig(**CELL.to_diff_dict()), add_pooling_layer=False).eval()
    plain.load_state_dict(model.cell_bert.state_dict())
    states = encode(model.cell_bert, packed).split(lengths)
    for sequence, state in zip(_sequences(packed), states, strict=True):
        expected = plain(input_ids=sequence.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def test_unimodal_text_equals_bert(model: LangCell) -> None:
    packed = _packed([5, 9, 30], 60)
    plain = BertModel(BertConfig(**TEXT.to_diff_dict()), add_pooling_layer=False).eval()
    missing, unexpected = plain.load_state_dict(model.text_bert.state_dict(), strict=False)
    assert not missing
    assert all("crossattention" in name for name in unexpected)
    states = encode(model.text_bert, packed).split([5, 9, 30])
    for sequence, state in zip(_sequences(packed), states, strict=True):
        torch.testing.assert_close(
            state, plain(input_ids=sequence.unsqueeze(0)).last_hidden_state[0], rtol=1e-5, atol=1e-5
        )


def test_mean_pooling_is_the_mean_of_each_text(model: LangCell) -> None:
    model.pooling = "mean"
    packed = _packed([5, 9, 30], 60)
    states = encode(model.text_bert, packed).split([5, 9, 30])
    torch.testing.assert_close(model.pool_texts(packed), torch.stack([s.mean(0) for s in states]))


def test_match_of_shared_cells_equals_every_pair_alone(model: LangCell) -> None:
    """Pairs that share a cell's keys and values, and cells without a pair, change no pair's logits."""
    cells, texts = _packed([6, 11, 4, 6], 50), _packed([5, 9, 9, 3, 7], 60, seed=1)
    cell_of_pair = torch.tensor([0, 0, 1, 3, 3])
    together = model.match(model.cell_states(cells), cells, texts, cell_of_pair)
    for pair, cell in enumerate(cell_of_pair.tolist()):
        one = cells.select(torch.tensor([cell]))
        alone = model.match(
            model.cell_states(one), one, texts.select(torch.tensor([pair])), torch.zeros(1, dtype=torch.int64)
        )
        torch.testing.assert_close(together[pair : pair + 1], alone, rtol=1e-5, atol=1e-5)


def test_text_self_attention_is_not_causal(model: LangCell) -> None:
    """A later token must change an earlier state (transformers' decoders would mask it)."""
    packed = _packed([6], 60)
    changed = packed.tokens_T.clone()
    changed[-1] = 2 if changed[-1] != 2 else 3
    first = [encode(model.text_bert, p)[0] for p in (packed, packed.with_tokens(changed))]
    assert not torch.allclose(*first)


def test_select_repacks_rows_in_order() -> None:
    packed = _packed([3, 1, 4], 50)
    picked = packed.select(torch.tensor([2, 0, 2]))
    a, b, c = _sequences(packed)
    assert [s.tolist() for s in _sequences(picked)] == [c.tolist(), a.tolist(), c.tolist()]
    assert picked.max_seqlen == 4
    assert b.numel() == 1
    assert picked.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]


def test_more_tokens_than_offsets_can_say_are_refused() -> None:
    with pytest.raises(OverflowError, match="2,147,483,648 tokens"):
        Packed.from_offsets(np.empty(0, np.uint16), np.array([0, 2**31]))
