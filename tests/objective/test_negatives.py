"""Negatives: no mined one is true of its cell, and draws follow the hard distribution."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from langcell.batch import MicroBatch, Packed
from langcell.objective.global_batch import Compared, Views, compare
from langcell.objective.lanes import Lanes
from langcell.objective.negatives import initiators
from langcell.objective.options import ObjectiveOptions


def batch_of(text: Tensor, term: Tensor, words: Tensor, short: Tensor) -> MicroBatch:
    """Cells with these texts (indices), each text with a term, a row of the table and a length."""
    n = len(text)
    return MicroBatch(
        cells=Packed.from_sequences([[0]] * n),
        soma_joinid_B=torch.arange(n) * 7,
        text_id_B=text + 50,
        term_B=term[text],
        text_row_B=words[text],
        short_B=short[text],
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[MicroBatch, Tensor]:
    """A global batch with duplicated texts, texts in the same words, shortened variants and an ontology
    forest."""
    terms = draw(st.integers(1, 6))
    parent = [draw(st.integers(-1, t - 1)) for t in range(terms)]
    related = torch.zeros(terms, terms, dtype=torch.bool)
    for t in range(terms):
        up = parent[t]
        while up >= 0:
            related[t, up] = related[up, t] = True
            up = parent[up]
    texts = draw(st.integers(1, 8))
    term = torch.tensor([draw(st.integers(0, terms - 1)) for _ in range(texts)])
    short = torch.tensor([draw(st.booleans()) for _ in range(texts)])
    words = torch.tensor([draw(st.integers(0, texts - 1)) for _ in range(texts)])
    text = torch.tensor(draw(st.lists(st.integers(0, texts - 1), min_size=1, max_size=12)))
    return batch_of(text, term, words, short), related


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)))


def compared(
    batch: MicroBatch, related: Tensor, step: int, views: Views | None = None, **options: object
) -> Compared:
    n = len(batch)
    if views is None:
        views = Views(unit(n, 3 * step), unit(n, 3 * step + 1), unit(n, 3 * step + 2), torch.tensor([0.1]))
    how = ObjectiveOptions(**options)  # type: ignore[arg-type]
    return compare(views, [batch], Lanes.here(), how, related, seed=1, step=step)


def is_true_of(batch: MicroBatch, related: Tensor, cell: int, text: int) -> bool:
    """Whether the text drawn for cell `text` may be true of cell `cell`: the design's rule, in words."""
    if batch.text_id_B[cell] == batch.text_id_B[text] or batch.text_row_B[cell] == batch.text_row_B[text]:
        return True
    a, b = int(batch.term_B[cell]), int(batch.term_B[text])
    return bool(related[a, b]) or (a == b and bool(batch.short_B[text]))


@pytest.mark.parametrize("mining", ["exact", "balanced"])
@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 1000))
def test_no_mined_negative_is_true_of_its_cell(
    mining: str, made: tuple[MicroBatch, Tensor], step: int
) -> None:
    batch, related = made
    n = len(batch)
    result = compared(batch, related, step, ctm_mining=mining)
    pairs = result.pairs
    assert pairs is not None
    assert len(pairs.cell_P) == 3 * n
    assert pairs.match_P.tolist() == [True] * n + [False] * 2 * n
    assert torch.equal(pairs.cell_P[:n], torch.arange(n))
    assert torch.equal(pairs.text_row_P[:n], batch.text_row_B)
    drawn = pairs.weight_P > 0
    for cell, row in zip(pairs.cell_P[n:][drawn[n:]], pairs.text_row_P[n:][drawn[n:]], strict=True):
        # Rows in the same words: one of them was drawn.
        others = (batch.text_row_B == row).nonzero().flatten().tolist()
        assert not all(is_true_of(batch, related, int(cell), other) for other in others)
    # What found no partner: exactly where nothing was admissible.
    admissible = torch.tensor([[not is_true_of(batch, related, i, j) for j in range(n)] for i in range(n)])
    assert torch.equal(drawn[n : 2 * n], admissible.any(1))
    assert torch.equal(drawn[2 * n :], admissible.any(1 if mining == "balanced" else 0))
    assert float(result.empty) == (~drawn).sum()
    assert float(pairs.weight_P.sum()) == pytest.approx(1)


def test_paper_preset_draws_any_other_row() -> None:
    """Three cells, one text: with `paper` the others' rows are negatives, though in the same words."""
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = batch_of(torch.zeros(3, dtype=torch.int64), zeros, zeros, zeros.bool())
    none = torch.zeros(1, 1, dtype=torch.bool)
    paper, ours = compared(batch, none, 0, preset="paper"), compared(batch, none, 0)
    assert (float(paper.empty), float(ours.empty)) == (0, 6)
    assert paper.pairs is not None
    assert (paper.pairs.weight_P > 0).all()


@settings(max_examples=30, deadline=None)
@given(batches())
def test_draws_do_not_depend_on_the_order_of_rows(made: tuple[MicroBatch, Tensor]) -> None:
    batch, related = made
    n = len(batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    views = Views(unit(n, 1), unit(n, 2), unit(n, 3), torch.tensor([0.1]))
    shuffled_views = Views(unit(n, 1)[order], unit(n, 2)[order], unit(n, 3)[order], views.tau_1)
    names = [field.name for field in fields(batch) if field.name != "cells"]
    shuffled = MicroBatch(cells=batch.cells, **{name: getattr(batch, name)[order] for name in names})

    def mined(batch: MicroBatch, views: Views) -> list[tuple[int, int, bool]]:
        pairs = compared(batch, related, 4, views).pairs
        assert pairs is not None
        return sorted(
            (int(batch.soma_joinid_B[c]), int(t), bool(m))
            for c, t, m in zip(pairs.cell_P, pairs.text_row_P, pairs.match_P, strict=True)
        )

    assert mined(batch, views) == mined(shuffled, shuffled_views)


def test_hard_draws_follow_exp_of_the_scores() -> None:
    """Over 4,000 steps the share of each column is its weight in the design, within 4 standard errors."""
    n, steps = 4, 4000
    text = torch.arange(n)
    batch = batch_of(text, text, text, torch.zeros(n, dtype=torch.bool))
    none = torch.zeros(n, n, dtype=torch.bool)
    first, texts = unit(n, 5), unit(n, 6)
    views = Views(first, first, texts, torch.tensor([0.5]))
    scores = (first @ texts.T / 0.5).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    hard_text, hard_cell, second_text = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    for step in range(steps):
        for mining, third in (("exact", hard_cell), ("balanced", second_text)):
            pairs = compared(batch, none, step, views, ctm_mining=mining).pairs
            assert pairs is not None
            if mining == "exact":
                hard_text[pairs.text_row_P[n]] += 1
                third[pairs.cell_P[2 * n]] += 1
            else:
                third[pairs.text_row_P[2 * n]] += 1
    balanced = (scores[0] - scores.logsumexp(dim=0)).softmax(0)
    expected = (scores[0].softmax(0), scores[:, 0].softmax(0), balanced)
    for counts, share in zip((hard_text, hard_cell, second_text), expected, strict=True):
        error = (share * (1 - share) / steps).sqrt()
        assert ((counts / steps - share).abs() < 4 * error + 1e-9).all()


def test_a_rank_that_holds_few_logits_draws_and_sums_the_same() -> None:
    text = torch.tensor([0, 1, 2, 0, 3, 1, 2])
    batch = batch_of(text, torch.tensor([0, 1, 2, 1]), torch.arange(4), torch.tensor([0, 0, 1, 0]).bool())
    related = torch.zeros(3, 3, dtype=torch.bool)
    related[0, 1] = related[1, 0] = True
    found = []
    for rows in (None, 3, 1):
        leaves = [unit(7, seed).requires_grad_() for seed in (1, 2, 3)]
        result = compared(batch, related, 2, Views(*leaves, torch.tensor([0.1])), logit_rows=rows)
        gradients = torch.autograd.grad(result.shares["cc"] + result.shares["ct"], leaves)
        assert result.pairs is not None
        found.append((result, gradients))
    for result, gradients in found[1:]:
        for a, b in zip(vars(result.pairs).values(), vars(found[0][0].pairs).values(), strict=True):
            assert torch.equal(a, b)
        for name, share in result.shares.items():
            torch.testing.assert_close(share, found[0][0].shares[name])
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b)


def test_seeded_subset_takes_the_same_number_of_each_lane() -> None:
    joinid = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(3, 8)
    chosen = initiators(joinid, cells=2, seed=1, step=5)
    assert chosen.shape == (3, 2)
    assert torch.equal(chosen[1:], initiators(joinid[1:], cells=2, seed=1, step=5))
    assert not torch.equal(chosen, initiators(joinid, cells=2, seed=1, step=6))
