"""The loop of a fine-tuning: as many workers as there are, killed or not, the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from langcell.batch import Packed
from langcell.bench.ranks import run_ranks
from langcell.errors import InputError, RunError
from langcell.train.finetune import Examples, Task, fit
from langcell.train.fitting import classifier_task, few_shot_task, fit_classifier, fit_few_shot
from langcell.train.options import FitOptions
from tests.objective import toy

CPU = torch.device("cpu")
OWN = torch.tensor([0, 0, 0, 1, 2, 1, 2])
# Seven cells by five: the second step has two, fewer than three workers. Forwards of one to three cells.
OPTIONS = FitOptions(epochs=2, batch=5, lr=1e-2, head_lr=1e-2, batch_tokens=24, clip=0.5, seed=3)


def some(first: int, count: int) -> tuple[Packed, Tensor]:
    return toy.batch(first, count).cells, OWN[:count]


def classifying(dropout: float = 0.0, mode: str = "full", **changed: Any) -> Task:
    return classifier_task(
        toy.model(dropout),
        some(0, 7),
        some(7, 4),
        kind="classification",
        outputs=3,
        mode=mode,  # type: ignore[arg-type]
        lora_rank=2,
        options=replace(OPTIONS, **changed),
    )


def few_shot(**changed: Any) -> Task:
    texts = toy.texts().packed.select(torch.tensor([0, 3, 4]))
    options = replace(OPTIONS, batch_tokens=60, lr=2e-4, **changed)
    return few_shot_task(toy.model(), some(0, 7), texts, some(7, 4), tau=0.5, options=options)


def fitted(task: Task, **arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    history = fit(task, CPU, **arguments)
    weights = {n: p.detach().clone() for n, p in task.module.named_parameters() if p.requires_grad}
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history], weights


def of_rank(rank: int, what: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    return fitted(few_shot() if what == "few_shot" else classifying(mode=what))


@pytest.mark.parametrize(
    ("what", "world"),
    [
        ("full", 2),
        ("few_shot", 2),
        pytest.param("full", 3, marks=[pytest.mark.slow, pytest.mark.soak]),
        pytest.param("lora", 2, marks=pytest.mark.slow),
        pytest.param("frozen", 3, marks=[pytest.mark.slow, pytest.mark.soak]),
        pytest.param("few_shot", 3, marks=pytest.mark.slow),
    ],
)
def test_several_workers_equal_one(what: str, world: int) -> None:
    [(history, weights)] = run_ranks(of_rank, 1, what)
    for theirs, their_weights in run_ranks(of_rank, world, what):
        for one, other in zip(history, theirs, strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        for name, weight in weights.items():
            # Adam divides a gradient by its size: one that is rounding alone (a key's bias) moves at random.
            near = 1e-2 if "key.bias" in name else 1e-5
            torch.testing.assert_close(
                their_weights[name],
                weight,
                rtol=near,
                atol=near,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_every_cell_is_learnt_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = classifying(), []
    forward = task.module.forward

    def look(cells: Packed, target: Tensor, weight_B: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            assert (weight_B == 1).all()
            assert cells.tokens_T.numel() <= OPTIONS.batch_tokens
            seen.append([tuple(cells.select(torch.tensor([i])).tokens_T.tolist()) for i in range(len(cells))])
        return forward(cells, target, weight_B)

    monkeypatch.setattr(task.module, "forward", look)
    fit(task, CPU)
    flat = [cell for cells in seen for cell in cells]
    all_cells = {tuple(some(0, 7)[0].select(torch.tensor([i])).tokens_T.tolist()) for i in range(7)}
    assert set(flat[:7]) == set(flat[7:]) == all_cells
    assert flat[:7] != flat[7:], "another order in the second epoch"


def test_a_killed_fine_tuning_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    def task(folder: Path) -> Task:
        return replace(classifying(dropout=0.3, epochs=4), folder=folder, fingerprint="a")

    whole, weights = fitted(task(tmp_path / "whole"))

    def die(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(task(tmp_path / "killed"), CPU, die)
    (tmp_path / "killed" / "epoch-0003.safetensors.tmp").write_bytes(b"half")
    told: list[int] = []
    history, again = fitted(task(tmp_path / "killed"), told=lambda row: told.append(row["epoch"]))
    assert told == [3, 4]
    assert history == whole
    for name, weight in weights.items():
        assert torch.equal(again[name], weight), name
    finished, same = fitted(task(tmp_path / "killed"))  # nothing is left to do
    assert finished == whole
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_a_damaged_epoch_is_passed_over(tmp_path: Path) -> None:
    task = replace(classifying(epochs=3), folder=tmp_path, fingerprint="a")
    _, weights = fitted(task)
    newest = max(tmp_path.glob("epoch-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    _, again = fitted(replace(classifying(epochs=3), folder=tmp_path, fingerprint="a"))
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_another_fine_tuning_is_not_gone_on_with(tmp_path: Path) -> None:
    fit(replace(classifying(epochs=1), folder=tmp_path / "checkpoints", fingerprint="a"), CPU)
    with pytest.raises(InputError, match="of other cells, options or weights"):
        fit(replace(classifying(epochs=1), folder=tmp_path / "checkpoints", fingerprint="b"), CPU)


def test_the_best_epoch_by_validation_is_kept(tmp_path: Path) -> None:
    """A rate at which the loss on cells of wrong classes only grows."""
    wrong = (some(0, 7)[0], (OWN + 1) % 3)
    task = replace(classifying(epochs=4), val=Examples(*wrong), folder=tmp_path, fingerprint="a")
    history, weights = fitted(task)
    losses = [row["val_loss"] for row in history]
    best = int(np.argmin(losses))
    assert best < 3
    shorter = replace(classifying(epochs=4), val=Examples(*wrong))

    class Stop(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == best + 1:
            raise Stop

    with pytest.raises(Stop):
        fit(shorter, CPU, stop)
    for name, p in shorter.module.named_parameters():
        assert torch.equal(p, weights[name]), name
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"epoch-{best + 1:04d}.safetensors", "epoch-0004.safetensors"]


def test_a_loss_that_is_no_number_ends_it_and_is_not_kept(tmp_path: Path) -> None:
    task = replace(classifying(), folder=tmp_path, fingerprint="a")
    with torch.no_grad():
        next(task.module.parameters()).fill_(torch.nan)
    with pytest.raises(RunError, match=r"epoch 1: the loss is nan.*lower fit\.lr"):
        fit(task, CPU)
    assert not list(tmp_path.iterdir())


def test_without_validation_the_last_epoch_is_kept() -> None:
    history, _ = fitted(replace(classifying(), val=Examples(Packed.from_sequences([]), OWN[:0])))
    assert [row["val_loss"] for row in history] == [None, None]


def test_bf16_learns_about_the_same() -> None:
    fp32, _ = fitted(classifying())
    bf16, weights = fitted(classifying(precision="bf16"))
    assert bf16[-1]["loss"] == pytest.approx(fp32[-1]["loss"], rel=0.05)
    assert bf16 != fp32
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_a_call_in_this_process_learns_the_cells(mode: str) -> None:
    model, (cells, own) = toy.model().eval(), some(0, 7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = FitOptions(epochs=30, batch=7, lr=1e-2 if mode == "lora" else 3e-3, head_lr=0.3)
    made = fit_classifier(model, cells, own, outputs=3, mode=mode, lora_rank=2, options=options)  # type: ignore[arg-type]
    assert made(cells).argmax(1).tolist() == own.tolist()
    assert not made.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_few_shots_in_this_process_make_the_own_text_the_best() -> None:
    model, (cells, own) = toy.model().eval(), some(0, 7)
    texts = toy.texts().packed.select(torch.tensor([0, 3, 4]))
    options = FitOptions(epochs=25, batch=7, lr=3e-3)
    made = fit_few_shot(model, cells, own, texts, tau=0.2, options=options)
    z_c, z_t = made.project_cells(made.cell_states(cells), cells), made.project_texts(texts)
    assert (z_c @ z_t.T).argmax(1).tolist() == own.tolist()
    assert not torch.equal(made.ctm_head.weight, model.ctm_head.weight)
