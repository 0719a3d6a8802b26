"""The straightforward step is ours, whatever it saves: the same losses, the same gradients; and the formula
counts what each does."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from langcell.bench.hf_step import ALL, NONE, HfStep, Savings, pairs_run, work_of
from langcell.bench.step_work import gradient_difference
from langcell.model.flops import Work, step_flops
from langcell.objective.cached import views_of
from langcell.objective.lanes import Lanes
from langcell.objective.stages import LOSSES
from tests.model.test_flops import MAPPING
from tests.objective import toy

STEP = 3
ALL_SAVINGS = [Savings(*flags) for flags in itertools.product((False, True), repeat=4)]


def run(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    losses = module(toy.batch(), STEP)
    losses["total"].backward()
    gradients = {
        name.removeprefix("stage."): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    names = [*LOSSES[2], "total"]
    return {name: losses[name].detach() for name in names if name in losses}, gradients


@pytest.mark.parametrize("view", ["own", "shared"])
@pytest.mark.parametrize("number", [1, 2])
def test_every_saving_leaves_losses_and_gradients(number: int, view: str) -> None:
    losses, gradients = run(toy.stage(number, mgm_view=view))
    for savings in ALL_SAVINGS if view == "own" else (NONE, ALL):
        other_losses, other_gradients = run(HfStep(toy.stage(number, mgm_view=view), savings))
        for name, loss in other_losses.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-6, msg=f"{name}, {savings}")
        assert gradients.keys() == other_gradients.keys()
        apart = gradient_difference(gradients, other_gradients)
        assert apart["gradient_difference"] < 1e-5, savings
        assert apart["worst_gradient_difference"] < 1e-3, savings


def test_a_learnt_temperature_is_learnt_by_both() -> None:
    ours, theirs = (
        run(module)[1] for module in (toy.stage(tau_learnt=True), HfStep(toy.stage(tau_learnt=True)))
    )
    name = "temperature.log_tau_1"
    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_padding_is_seen_by_nothing() -> None:
    """A batch with a longer cell: what is said of the others' genes stays, though all are padded more."""
    step = HfStep(toy.stage(1))
    batch = toy.batch(4, 4)
    states = step._encode(step.stage.model.cell_bert, batch.cells)
    alone = step._encode(step.stage.model.cell_bert, batch.cells.select(torch.tensor([2])))
    assert states.states_NW.shape[0] == 4 * 11
    first, length = int(batch.cells.starts_B[2]), int(batch.cells.lengths_B[2])
    torch.testing.assert_close(states.states_NW[states.slot_T[first : first + length]], alone.states_NW)


@pytest.mark.parametrize("savings", ALL_SAVINGS, ids=lambda s: "".join(str(int(flag)) for flag in astuple(s)))
def test_the_operations_of_each_saving_are_counted(savings: Savings) -> None:
    """Against PyTorch's own count of the whole step; contrast and mining, which the formula leaves out, are
    three and two products of 8 x 8 rows in the forward, and twice the three in the backward."""
    stage, batch = toy.stage(2), toy.batch()
    with torch.no_grad():
        views = views_of([stage(batch, STEP, look=0)])
    pairs = stage.compare(views, [batch], Lanes.here(), STEP).pairs
    assert pairs is not None
    work = work_of(stage, batch, stage.mask(batch, STEP), pairs.of_rows(0, len(batch)), savings)
    model = stage.model
    found = step_flops(work, model.cell_bert.config, model.text_bert.config, model.cell_proj.out_features)

    module = HfStep(stage, savings)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counted:
        module(batch, STEP)["total"].backward()
    product = 2 * len(batch) ** 2 * model.cell_proj.out_features
    contrast = counted.get_total_flops() - found.total
    assert contrast % product == 0
    assert contrast / product == 11


@pytest.mark.parametrize("number", [1, 2])
def test_the_step_counts_its_own_operations(number: int) -> None:
    stage, batch = toy.stage(number), toy.batch()
    with torch.no_grad():
        told = stage(batch, STEP)["work"]
        pairs = stage.compare(views_of([stage(batch, STEP, look=0)]), [batch], Lanes.here(), STEP).pairs
    assert Work(*told.tolist()) == work_of(stage, batch, stage.mask(batch, STEP), pairs, ALL)


def test_distinct_pairs_keep_all_weights() -> None:
    stage, batch = toy.stage(2), toy.batch()
    with torch.no_grad():
        views = views_of([stage(batch, STEP, look=0)])
    pairs = stage.compare(views, [batch], Lanes.here(), STEP).pairs
    assert pairs is not None
    every, distinct = (pairs_run(pairs, len(stage.texts.packed), savings) for savings in (NONE, ALL))
    assert len(every.cell_U) == 24
    assert len(distinct.cell_U) <= 24
    torch.testing.assert_close(every.weight_U2.sum(0), distinct.weight_U2.sum(0))
    assert distinct.cell_U.tolist() == sorted(distinct.cell_U.tolist())


def test_locked_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="trains all text layers"):
        HfStep(toy.stage(2, text_train="projection"))
