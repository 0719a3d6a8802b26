"""LangCell-CE: which weights train in each mode, and that low-rank updates merge into the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.model.classifier import CellClassifier, classifier, merge, started, with_cells
from langcell.objective.supervised import Supervised, supervised_loss
from tests.objective import toy

TARGETS = [torch.tensor([0, 2, 1, 0]), torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.eye(4)[:, :3]]
KINDS = ["classification", "regression", "multilabel"]


def made(mode: str, outputs: int = 3) -> CellClassifier:
    return classifier(toy.model().cell_bert, outputs, mode, lora_rank=2, seed=1)  # type: ignore[arg-type]


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def step(module: CellClassifier, kind: str, target: Tensor, cells: Packed | Tensor, lr: float = 0.1) -> None:
    loss = Supervised(module, kind)(cells, target, torch.ones(4))  # type: ignore[arg-type]
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


@pytest.fixture(scope="module")
def cells() -> Packed:
    return toy.batch(0, 4).cells


@pytest.mark.parametrize(("kind", "target"), list(zip(KINDS, TARGETS, strict=True)))
def test_gradients_reach_all_of_a_full_model(cells: Packed, kind: str, target: Tensor) -> None:
    full = made("full", 1 if kind == "regression" else 3)
    step(full, kind, target, cells)
    for name, parameter in full.named_parameters():
        # All scores of a query move alike with a key's bias.
        assert parameter.grad is not None, name
        assert "key.bias" in name or parameter.grad.abs().max() > 0, name


def test_a_frozen_encoder_stays_and_states_stand_for_sentences(cells: Packed) -> None:
    frozen = made("frozen").eval()
    assert trained(frozen) == {"head.weight", "head.bias"}
    states = frozen.states(cells).detach()
    assert torch.equal(frozen(states), frozen(cells))
    before = {name: p.clone() for name, p in frozen.cell_bert.named_parameters()}
    step(frozen, "classification", TARGETS[0], states)
    assert all(torch.equal(p, before[name]) for name, p in frozen.cell_bert.named_parameters())
    assert frozen.head.weight.grad is not None


def test_low_rank_updates_train_alone_and_merge(cells: Packed) -> None:
    lora = made("lora")
    names = trained(lora)
    layers = toy.model().cell_bert.config.num_hidden_layers
    assert sum("lora_" in name for name in names) == layers * 2 * 2  # query and value, A and B
    assert {name for name in names if "lora_" not in name} == {"head.weight", "head.bias"}
    original = dict(toy.model().cell_bert.named_parameters())
    for _ in range(3):  # B starts at zero, so that A has no gradient at first
        lora.zero_grad()
        step(lora, "classification", TARGETS[0], cells)
    assert all(dict(lora.named_parameters())[name].grad.abs().max() > 0 for name in names)
    base = {name: p for name, p in lora.cell_bert.named_parameters() if "lora_" not in name}
    assert len(base) == len(original)
    for name, parameter in base.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, original[plain]), name
    unmerged = lora.eval()(cells).detach()
    changed = (unmerged - made("frozen").eval()(cells)).abs().max()
    assert changed > 1e-3
    merged = merge(lora)
    torch.testing.assert_close(merged(cells), unmerged, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in merged.cell_bert.named_parameters()} == original.keys()


def test_the_model_given_is_left_alone(cells: Packed) -> None:
    model = toy.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(classifier(model.cell_bert, 3, "full", lora_rank=2, seed=0), KINDS[0], TARGETS[0], cells)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_losses_are_those_of_the_textbook() -> None:
    output = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    p = output.exp() / output.exp().sum(1, keepdim=True)
    target = torch.tensor([1, 0])
    ours = supervised_loss(output, target, "classification")
    torch.testing.assert_close(ours, -p[[0, 1], target].log())
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    q = 1 / (1 + (-output).exp())
    bce = -(labels * q.log() + (1 - labels) * (1 - q).log()).mean(1)
    torch.testing.assert_close(supervised_loss(output, labels, "multilabel"), bce)
    squared = supervised_loss(output[:, :1], torch.tensor([3.0, -1.0]), "regression")
    torch.testing.assert_close(squared, torch.tensor([4.0, 1.0]))


def test_other_weights_to_start_from(cells: Packed, tmp_path: Path) -> None:
    model = toy.model().eval()
    theirs = toy.model()
    with torch.no_grad():
        for parameter in theirs.cell_bert.parameters():
            parameter += 0.1
    theirs.cell_bert.save_pretrained(tmp_path / "geneformer")
    got = started(model, str(tmp_path / "geneformer"), 0)
    torch.testing.assert_close(got.cell_states(cells), theirs.eval().cell_states(cells))
    fresh = started(model, "random", 3)
    assert torch.equal(fresh.cell_states(cells), started(model, "random", 3).cell_states(cells))
    assert not torch.allclose(fresh.cell_states(cells), started(model, "random", 4).cell_states(cells))
    for other in (got, fresh):
        assert torch.equal(other.text_bert.embeddings.word_embeddings.weight,
                           model.text_bert.embeddings.word_embeddings.weight)  # fmt: skip
        assert other.gene_head.predictions.decoder.weight is other.cell_bert.embeddings.word_embeddings.weight
        assert other.cell_bert is not model.cell_bert


def test_a_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    deeper = toy.model().cell_bert.config
    deeper.num_hidden_layers = 3
    from langcell.model.cell_encoder import cell_encoder

    cell_encoder(deeper).save_pretrained(tmp_path / "deep")
    with pytest.raises(InputError, match="has num_hidden_layers 3, the model 2"):
        started(toy.model(), str(tmp_path / "deep"), 0)


def test_a_model_around_another_encoder(cells: Packed) -> None:
    model, other = toy.model().eval(), made("full")
    step(other, KINDS[0], TARGETS[0], cells)
    around = with_cells(model, other.cell_bert)  # type: ignore[arg-type]
    assert around.cell_bert is other.cell_bert
    torch.testing.assert_close(around.cell_states(cells)[cells.starts_B], other.eval().states(cells))
    assert not torch.allclose(around.cell_states(cells), model.cell_states(cells))
