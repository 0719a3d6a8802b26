import numpy as np
import pytest
import torch
from transformers import BertConfig

from langcell.batch import Packed
from langcell.inference.scoring import Question, answer, zero_shot
from langcell.model.langcell import LangCell

TAU = 0.05


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    cells = [rng.integers(0, 50, n) for n in rng.integers(2, 40, 23)]
    texts = [rng.integers(0, 50, n) for n in rng.integers(3, 12, 7)]
    return cells, texts


@pytest.fixture
def langcell():
    """The real thing, two layers a side, with every bias and norm away from its start."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"vocab_size": 50, "max_position_embeddings": 64, **shape}
    model = LangCell(BertConfig(**config), BertConfig(**config), projection=8, pooling="mean").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def official(model, cells, texts, a):
    """The released form, one pair at a time: softmax of cosines over tau, softmax of P(match)."""
    rows = []
    with torch.inference_mode():
        for cell in cells:
            packed = Packed.from_sequences([cell])
            states = model.cell_states(packed)
            z = model.project_cells(states, packed)[0].double().numpy()
            cosines, match = [], []
            for text in texts:
                one = Packed.from_sequences([text])
                cosines.append(z @ model.project_texts(one)[0].double().numpy())
                logits = (
                    model.match(states, packed, one, torch.zeros(1, dtype=torch.int64))[0].double().numpy()
                )
                match.append(softmax(logits)[1])
            rows.append(a * softmax(np.array(cosines) / TAU) + (1 - a) * softmax(np.array(match)))
    return np.array(rows)


def score(model, data, **options):
    cells, texts = map(Packed.from_sequences, data)
    return zero_shot(model, cells, texts, **{"tau": TAU, "a": 0.1, "top_k": 7, "batch_tokens": 64, **options})


@pytest.mark.parametrize("a", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_with_every_candidate_matched_it_is_the_official_form(toy, data, a, batch_tokens):
    model = toy.Model().eval()
    scores = score(model, data, a=a, batch_tokens=batch_tokens)
    np.testing.assert_allclose(scores.two_step_NC, official(model, *data, a), atol=2e-6)
    np.testing.assert_allclose(scores.ct_NC, official(model, *data, 1.0), atol=2e-6)


def test_the_model_itself_gives_the_official_form(langcell, data):
    cells, texts = data[0][:6], data[1][:4]
    scores = score(langcell, (cells, texts), batch_tokens=64)
    expected = official(langcell, cells, texts, 0.1)
    assert np.ptp(expected, axis=1).min() > 1e-3  # the candidates differ
    np.testing.assert_allclose(scores.two_step_NC, expected, atol=1e-5)


def test_only_the_top_k_are_matched_and_pruned_ones_rank_below_by_contrast(toy, data):
    model = toy.Model().eval()
    scores = score(model, data, top_k=3)
    assert sum(pairs for pairs, _, _ in model.matched) == 23 * 3
    by_contrast = scores.ct_NC.argsort(1, descending=True)
    by_both = scores.two_step_NC.argsort(1, descending=True)
    assert torch.equal(by_both[:, 3:], by_contrast[:, 3:])
    assert torch.equal(by_both[:, :3].sort(1).values, by_contrast[:, :3].sort(1).values)
    assert not torch.equal(by_both[:, :3], by_contrast[:, :3])  # matching does decide among them
    # logits2 is the softmax over the three matched candidates alone.
    kept = scores.two_step_NC.gather(1, by_contrast[:, :3])
    torch.testing.assert_close(
        ((kept - 0.1 * scores.ct_NC.gather(1, by_contrast[:, :3])) / 0.9).sum(1), torch.ones(23)
    )


def test_pruned_candidates_keep_their_order_where_probabilities_vanish(toy, data):
    scores = score(toy.Model().eval(), data, tau=1e-3, top_k=2)
    cosine_order = score(toy.Model().eval(), data, tau=1.0, a=None).ct_NC.argsort(1, descending=True)
    assert (scores.ct_NC == 0).any()  # the probabilities do underflow
    assert torch.equal(scores.two_step_NC.argsort(1, descending=True)[:, 2:], cosine_order[:, 2:])


@pytest.mark.parametrize("top_k", [1, 4, 99])
def test_with_a_of_one_matching_changes_no_answer(toy, data, top_k):
    scores = score(toy.Model().eval(), data, a=1.0, top_k=top_k)
    assert torch.equal(scores.two_step_NC.argsort(1), scores.ct_NC.argsort(1))


def test_contrast_alone_matches_nothing(toy, data):
    model = toy.Model().eval()
    assert score(model, data, a=None).two_step_NC is None
    assert model.matched == []


def test_forwards_stay_in_the_budget(toy, data):
    model = toy.Model().eval()
    score(model, data, batch_tokens=64)
    assert len(model.matched) > 1
    assert all(text <= 64 and cell <= 64 for _, text, cell in model.matched)


def test_several_questions_equal_each_alone_and_share_their_pairs(toy, data):
    cells, texts = map(Packed.from_sequences, data)
    questions = [
        Question(torch.arange(23), torch.arange(7)),
        Question(torch.tensor([0, 5, 6, 22]), torch.tensor([4, 1])),
        Question(torch.empty(0, dtype=torch.int64), torch.tensor([2, 3])),
    ]
    options = {"tau": TAU, "a": 0.1, "top_k": 5, "batch_tokens": 64}
    model = toy.Model().eval()
    together = answer(model, cells, texts, questions, **options)
    # The second question adds a pair only where one of its two texts is not among a cell's top five.
    assert 23 * 5 <= sum(pairs for pairs, _, _ in model.matched) < 23 * 5 + 4 * 2
    for question, scores in zip(questions, together, strict=True):
        own = zero_shot(model, cells.select(question.rows_N), texts.select(question.columns_C), **options)
        torch.testing.assert_close(scores.ct_NC, own.ct_NC)
        torch.testing.assert_close(scores.two_step_NC, own.two_step_NC)


def test_no_cells_and_a_useless_k(toy, data):
    scores = score(toy.Model().eval(), ([], data[1]))
    assert scores.ct_NC.shape == scores.two_step_NC.shape == (0, 7)
    with pytest.raises(ValueError, match="top_k"):
        score(toy.Model().eval(), data, top_k=0)
