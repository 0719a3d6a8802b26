"""What a stage freezes, caches and starts from."""

from __future__ import annotations

import torch

from langcell.objective.stages import LOSSES
from tests.objective import toy


def test_stage_one_leaves_the_text_side_alone() -> None:
    trained = {name.split(".")[1] for name, p in toy.stage(1).named_parameters() if p.requires_grad}
    assert trained == {"cell_bert", "gene_head", "cell_proj"}


def test_locked_text_trains_projection_and_cross_attention_alone() -> None:
    stage = toy.stage(2, text_train="projection")
    text = [n for n, p in stage.named_parameters() if ".text_bert." in n and p.requires_grad]
    assert text
    assert all("crossattention" in name for name in text)
    assert stage.model.text_proj.weight.requires_grad


def test_locked_states_give_the_losses_of_live_ones() -> None:
    live, locked = toy.stage(2), toy.stage(2, text_train="projection")
    locked.pool_table()
    shares, of_locked = live(toy.batch(), 3), locked(toy.batch(), 3)
    for name in LOSSES[2]:
        torch.testing.assert_close(of_locked[name], shares[name], rtol=1e-5, atol=1e-6)
    texts = slice(4, 7)  # of g1: what is read from the table is no work
    assert (shares["work"][texts] > 0).all()
    assert not of_locked["work"][texts].any()


def test_three_passes_and_two() -> None:
    """`mgm_view: own` reads the cells three times, `shared` twice."""
    for view, passes in (("own", 3), ("shared", 2)):
        stage = toy.stage(1, mgm_view=view)
        calls = []
        stage.model.cell_bert.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        stage(toy.batch(), 0)
        assert len(calls) == passes


def test_without_dropout_the_two_views_of_cell_contrast_are_one() -> None:
    """C-C with equal views: each cell's own column is its nearest, so the loss is below log B."""
    shares = toy.stage(1)(toy.batch(), 0)
    assert float(shares["cc"].detach()) < torch.log(torch.tensor(8.0))
