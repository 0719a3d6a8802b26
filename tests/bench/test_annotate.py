"""`bench.py annotate`: the baseline is the notebook's algorithm, ours gives its answers; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from langcell.batch import Packed
from langcell.bench import annotate, annotate_work, official
from langcell.bench.annotate_work import AnnotateTask, generated_cells
from langcell.bench.official import Official
from langcell.census.synthetic import LAW
from langcell.errors import InputError
from langcell.inference.embed import tokenize
from langcell.inference.scoring import zero_shot
from langcell.model.interop import load_tokenizer
from langcell.model.langcell import LangCell

TAU, A, TEXT_LENGTH = 0.05, 0.1, 9
TEXTS = [
    "cell type: B cell. ",
    "cell type: T cell. A lymphocyte that matures in the thymus. ",
    "cell type: x; ",
    "cell type: natural killer cell. ",
]


@pytest.fixture
def toy() -> Callable[[str], LangCell]:
    """Two layers a side, MiniLM's words, every bias and norm away from its start."""

    def build(pooling: str) -> LangCell:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        cell = BertConfig(vocab_size=30, max_position_embeddings=40, intermediate_size=32, **shape)
        text = BertConfig(vocab_size=30_522, max_position_embeddings=16, intermediate_size=24, **shape)
        model = LangCell(cell, text, projection=8, pooling=pooling).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def cells() -> Packed:
    rng = np.random.default_rng(1)
    return Packed.from_sequences([rng.integers(2, 30, n) for n in (5, 31, 12, 1, 20)])


def bert(module: torch.nn.Module, ids_L: Tensor, context_SW: Tensor | None = None) -> Tensor:
    """States [L, H] of one sequence by BERT's formulas, from the tensors of `module`, in float64."""
    state = {name: tensor.double() for name, tensor in module.state_dict().items()}
    heads = module.config.num_attention_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return x * state[f"{name}.LayerNorm.weight"] + state[f"{name}.LayerNorm.bias"]

    def attend(x: Tensor, keys: Tensor, name: str) -> Tensor:
        q, k, v = (
            linear(source, f"{name}.self.{part}").unflatten(-1, (heads, -1)).transpose(0, 1)
            for part, source in (("query", x), ("key", keys), ("value", keys))
        )
        seen = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)
        return norm(linear(seen, f"{name}.output.dense") + x, f"{name}.output")

    at = "embeddings"
    x = state[f"{at}.word_embeddings.weight"][ids_L] + state[f"{at}.token_type_embeddings.weight"][0]
    x = norm(x + state[f"{at}.position_embeddings.weight"][: len(ids_L)], at)
    for layer in range(module.config.num_hidden_layers):
        at = f"encoder.layer.{layer}"
        x = attend(x, x, f"{at}.attention")
        if context_SW is not None:
            x = attend(x, context_SW, f"{at}.crossattention")
        inner = linear(x, f"{at}.intermediate.dense")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{at}.output.dense") + x, f"{at}.output")
    return x


@torch.no_grad()
def formula(model: LangCell, cells: Packed, texts: list[str]) -> Tensor:
    """The scores [N, C], one cell and one text at a time."""
    tokenizer = load_tokenizer("minilm")
    tokens = [tokenizer(text, truncation=True, max_length=TEXT_LENGTH)["input_ids"] for text in texts]
    assert max(map(len, tokens)) == TEXT_LENGTH > min(map(len, tokens))  # one is cut
    ids = [torch.tensor(one) for one in tokens]
    head = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def unit(pooled: Tensor, name: str) -> Tensor:
        z = head[f"{name}.weight"] @ pooled + head[f"{name}.bias"]
        return z / z.norm()

    def pool(states: Tensor) -> Tensor:
        return states[0] if model.pooling == "cls" else states.mean(0)

    z_texts = [unit(pool(bert(model.text_bert, one)), "text_proj") for one in ids]
    rows = []
    for sentence in cells.tokens_T.split(cells.lengths_B.tolist()):
        states = bert(model.cell_bert, sentence)
        z = unit(states[0], "cell_proj")
        cosines, match = [], []
        for one, z_text in zip(ids, z_texts, strict=True):
            both = bert(model.text_bert, one, states)[0]
            no, yes = head["ctm_head.weight"] @ both + head["ctm_head.bias"]
            cosines.append(z @ z_text / TAU)
            match.append(1 / (1 + (no - yes).exp()))
        rows.append(A * torch.stack(cosines).softmax(0) + (1 - A) * torch.stack(match).softmax(0))
    return torch.stack(rows)


def notebook(model: LangCell, cells: Packed, **savings: bool) -> Tensor:
    tokenizer = load_tokenizer("minilm")
    how: dict[str, Any] = {"tau": TAU, "a": A, "max_length": TEXT_LENGTH, **savings}
    return Official(model, tokenizer, **how).annotate(cells, TEXTS)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_baseline_is_the_formula_and_so_is_ours(
    toy: Callable[[str], LangCell], cells: Packed, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official, "BATCH_CELLS", 2)
    model = toy(pooling)
    expected = formula(model, cells, TEXTS).float()
    assert expected.diff(dim=1).abs().min() > 1e-4  # the candidates differ
    for savings in ({}, {"packing": True}, {"keys": True}):
        torch.testing.assert_close(notebook(model, cells, **savings), expected, rtol=0, atol=1e-5)
    texts = tokenize(load_tokenizer("minilm"), TEXTS, TEXT_LENGTH)
    scores = zero_shot(model, cells, texts, tau=TAU, a=A, top_k=len(TEXTS), batch_tokens=64).two_step_NC
    assert scores is not None
    assert annotate.compare(scores.numpy(), expected.numpy())["same_answers"] == 1


def test_the_baseline_leaves_the_model_alone(toy: Callable[[str], LangCell], cells: Packed) -> None:
    model = toy("cls")
    names = list(model.state_dict())
    notebook(model, cells, keys=True)
    assert list(model.state_dict()) == names
    assert {bert.config._attn_implementation for bert in (model.cell_bert, model.text_bert)} == {
        "langcell_packed"
    }


@pytest.mark.parametrize(("keys", "times"), [(False, len(TEXTS)), (True, 1)])
def test_keys_are_projected_for_every_candidate_anew_unless_they_are_shared(
    toy: Callable[[str], LangCell],
    cells: Packed,
    keys: bool,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(official, "BATCH_CELLS", 2)
    model, seen = toy("cls"), []
    baseline = Official(model, load_tokenizer("minilm"), tau=TAU, a=A, max_length=TEXT_LENGTH, keys=keys)
    key = baseline.text_bert.encoder.layer[0].crossattention.self.key
    (key.projection if keys else key).register_forward_hook(lambda *_: seen.append(None))
    baseline.annotate(cells, TEXTS)
    assert len(seen) == 3 * times  # batches of 2, 2 and 1 cells


def test_ours_matches_the_notebook_on_generated_cells_only_if_it_matches_all() -> None:
    task = AnnotateTask(cells=2, max_length=16, seed=0)
    texts = annotate.candidate_texts(3, seed=0)
    own, other = annotate_work.ours(task), annotate_work.notebook(task)
    theirs = other(texts)
    found = annotate.compare(own(texts, 3).scores_NC, theirs.scores_NC)
    assert found["cells"] == 2
    assert found["score_difference"] < 1e-6
    with pytest.raises(RuntimeError, match="not the answer of the notebook"):
        annotate.compare(own(texts, 1).scores_NC, theirs.scores_NC)


def test_a_trained_model_reads_cells_of_the_demo_as_it_was_trained(export: Path) -> None:
    setting = annotate_work._set(AnnotateTask(cells=5, max_length=2048, seed=0, export=str(export)))
    assert (setting.tau, setting.text_length) == (0.2, 64)
    assert len(setting.cells) == 5
    assert setting.cells.max_seqlen <= 128


@pytest.mark.parametrize(
    "wrong",
    [
        [[0.2, 0.5, 0.3], [0.41, 0.39, 0.2]],  # another answer
        [[0.2, 0.5, 0.3], [0.3898, 0.41, 0.2002]],  # a score that is off
        [[0.2, 0.5, 0.3], [float("nan")] * 3],
    ],
)
def test_what_is_not_the_same_ends_the_benchmark(wrong: list[list[float]]) -> None:
    theirs = np.array([[0.2, 0.5, 0.3], [0.39, 0.41, 0.2]], np.float32)
    assert annotate.compare(theirs + 1e-6, theirs)["least_margin"] == pytest.approx(0.02)
    with pytest.raises(RuntimeError, match="not the answer of the notebook"):
        annotate.compare(np.array(wrong, np.float32), theirs)


def test_generated_cells_have_the_lengths_of_a_census() -> None:
    cells, vocab_size = generated_cells(LAW.block, 2048, seed=0)
    assert vocab_size == 25_427
    assert 1_280 < cells.lengths_B.double().mean() < 1_380
    assert 0.2 < (cells.lengths_B == 2048).double().mean() < 0.3
    assert (cells.tokens_T[cells.starts_B] == vocab_size - 1).all()
    assert cells.tokens_T.min() >= 2
    few, _ = generated_cells(3, 100, seed=0)
    assert few.lengths_B.tolist() == cells.lengths_B[:3].clamp(max=100).tolist()


def test_candidates_are_a_seeded_choice_of_leukocytes() -> None:
    texts = annotate.candidate_texts(60, seed=0)
    assert texts == annotate.candidate_texts(60, seed=0) != annotate.candidate_texts(60, seed=1)
    assert len(set(texts)) == 60
    assert all(text.startswith("cell type: ") and ". " in text for text in texts)
    with pytest.raises(InputError, match="--candidates is 9999; there are"):
        annotate.candidate_texts(9999, seed=0)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--cells", "0"], "--cells is 0"),
        (["--trained_cells", "701"], "--trained_cells is 701; it must be 1 at least and 700 at most"),
        (["--top_k", "[5,60]"], "--top_k is [5, 60]; each must be 1 at least and less than --candidates"),
        (["--top_k", "[]"], "--top_k is []"),
        (["--candidates", "9999"], "--candidates is 9999"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], told: str, refused: Callable[[list[str]], str]
) -> None:
    assert told in refused(["annotate", *argv])


@pytest.mark.slow
def test_a_small_benchmark(
    measured: Callable[..., dict[str, Any]], export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["annotate", "--cells", "3", "--candidates", "12", "--top_k", "[3,2]", "--max_length", "64"]
    argv += ["--repeats", "1", "--model", str(export), "--trained_cells", "6"]
    summary = measured(argv, ["top_k"])
    details = summary["details"]
    assert set(details["ours"]) == {"3", "2", "12"}
    assert set(details["alone"]) == {"packing", "keys"}
    assert summary["top_k"]["ours"] == details["ours"]["3"]["cells_per_s"]
    assert details["ours"]["3"]["pairs_per_s"] == pytest.approx(3 * summary["top_k"]["ours"])
    assert details["baseline"]["pairs_per_s"] == pytest.approx(12 * summary["top_k"]["baseline"])
    assert details["equal"]["same_answers"] == 1
    assert set(details["agreement"]) == {"10", "12"}  # among the demo's types, and with others
    for each in details["agreement"].values():
        assert set(each["stays"]) == {"3", "2"}
        assert all(0 <= share <= 1 for share in each["stays"].values())
        assert (each["cells"], each["equal"]["cells"], each["equal"]["same_answers"]) == (6, 3, 1)
    assert details["lengths"]["longest"] == 64
    assert "answers that stay, trained model" in capsys.readouterr().out
