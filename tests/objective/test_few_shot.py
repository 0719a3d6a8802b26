"""The few-shot objective is the released one, and the cells of a step may be dealt anyhow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from langcell.batch import Packed
from langcell.objective.few_shot import FewShot, few_shot_loss
from tests.objective import toy

TAU = 0.05


def texts() -> Packed:
    return toy.texts().packed.select(torch.tensor([0, 3, 4]))


def test_loss_is_the_released_formula() -> None:
    random = np.random.default_rng(0)
    z_c, z_t = (random.normal(size=(n, 6)) for n in (5, 3))
    z_c, z_t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_c, z_t))
    p = random.uniform(size=(5, 3))
    own = np.array([0, 2, 1, 1, 0])

    def cross_entropy(logits: np.ndarray) -> np.ndarray:
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.log(shares[np.arange(5), own])

    expected = cross_entropy(z_c @ z_t.T / TAU) + cross_entropy(p)
    got = few_shot_loss(torch.tensor(z_c @ z_t.T / TAU), torch.tensor(p), torch.tensor(own))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_every_cell_is_read_with_every_text() -> None:
    """Against one forward of contrast and one of matching per pair."""
    model, cells, own = toy.model(double=True).eval(), toy.batch(0, 4).cells, torch.tensor([0, 2, 1, 1])
    module = FewShot(model, texts(), TAU)
    got = module(cells, own, torch.ones(4))
    contrast, matched = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    for b in range(4):
        cell = cells.select(torch.tensor([b]))
        states = model.cell_states(cell)
        for c in range(3):
            text = texts().select(torch.tensor([c]))
            cosine = model.project_cells(states, cell) @ model.project_texts(text).T
            contrast[b, c] = cosine.item() / TAU
            matched[b, c] = model.match(states, cell, text, torch.tensor([0])).softmax(1)[0, 1]
    torch.testing.assert_close(got, few_shot_loss(contrast, matched.float(), own).sum(), rtol=1e-4, atol=1e-4)


def test_parts_add_up_and_weight_zero_counts_nothing() -> None:
    module = FewShot(toy.model().eval(), texts(), TAU)
    cells, own = toy.batch(0, 4).cells, torch.tensor([0, 2, 1, 1])
    whole = module(cells, own, torch.ones(4))
    parts = [
        module(cells.select(rows), own[rows], torch.ones(len(rows)))
        for rows in (torch.tensor([3, 0]), torch.tensor([1, 2]))
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)
    one = module(cells, own, torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(one, module(cells.select(torch.tensor([0])), own[:1], torch.ones(1)))


def test_both_encoders_and_all_heads_learn() -> None:
    model = toy.model()
    module = FewShot(model, texts(), TAU)
    module(toy.batch(0, 4).cells, torch.tensor([0, 2, 1, 1]), torch.ones(4)).backward()
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters()} - learnt == {
        name for name, _ in model.named_parameters() if name.startswith("gene_head.")
    }
    for name in learnt:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert "key.bias" in name or gradient.abs().max() > 0, name
    with pytest.raises(IndexError):
        module(toy.batch(0, 4).cells, torch.tensor([0, 2, 1, 3]), torch.ones(4))
