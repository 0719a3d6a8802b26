"""Negatives: no mined one is true of its cell, and draws follow the hard distribution."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.objective.negatives import Rows, initiators, mine_pairs, relations


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, torch.Tensor]:
    """A global batch with duplicated texts, unknown terms, shortened variants and an ontology forest."""
    terms = draw(st.integers(1, 6))
    parent = [draw(st.integers(-1, t - 1)) for t in range(terms)]
    related = torch.zeros(terms, terms, dtype=torch.bool)
    for t in range(terms):
        up = parent[t]
        while up >= 0:
            related[t, up] = related[up, t] = True
            up = parent[up]
    texts = draw(st.integers(1, 8))
    term_of_text = torch.tensor([draw(st.integers(-1, terms - 1)) for _ in range(texts)])
    short_of_text = torch.tensor([draw(st.booleans()) for _ in range(texts)])
    text = torch.tensor(draw(st.lists(st.integers(0, texts - 1), min_size=1, max_size=12)))
    return (
        Rows(torch.arange(len(text)) * 7, text + 50, term_of_text[text], text, short_of_text[text]),
        related,
    )


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 1000))
def test_no_mined_negative_is_true_of_its_cell(made: tuple[Rows, torch.Tensor], step: int) -> None:
    rows, related = made
    relation = relations(rows, related, paper=False)
    logits = torch.randn(len(rows), len(rows), generator=torch.Generator().manual_seed(step))
    everyone = torch.arange(len(rows))
    pairs = mine_pairs(logits, relation, rows.soma_joinid_G, everyone, seed=1, step=step)
    assert len(pairs.cell_P) == 3 * len(rows)
    for cell, text, match, weight in zip(
        pairs.cell_P, pairs.text_P, pairs.match_P, pairs.weight_P, strict=True
    ):
        same = rows.text_id_G[cell] == rows.text_id_G[text]
        if match:
            assert cell == text
            assert weight == 1
            continue
        if weight == 0:  # nothing admissible: the own text stands in
            assert cell == text
            continue
        a, b = int(rows.term_G[cell]), int(rows.term_G[text])
        assert not same
        assert a < 0 or b < 0 or not related[a, b]
        assert a < 0 or a != b or not rows.short_G[text]


@settings(max_examples=60, deadline=None)
@given(batches())
def test_a_weight_of_zero_means_that_nothing_was_admissible(made: tuple[Rows, torch.Tensor]) -> None:
    rows, related = made
    n = len(rows)
    relation = relations(rows, related, paper=False)
    pairs = mine_pairs(torch.zeros(n, n), relation, rows.soma_joinid_G, torch.arange(n), seed=1, step=0)
    admissible = relation.admissible_GG
    assert torch.equal(pairs.weight_P[n : 2 * n] == 1, admissible.any(1))
    assert torch.equal(pairs.weight_P[2 * n :] == 1, admissible.any(0))


@settings(max_examples=30, deadline=None)
@given(batches())
def test_draws_do_not_depend_on_the_order_of_rows(made: tuple[Rows, torch.Tensor]) -> None:
    rows, related = made
    n = len(rows)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    shuffled = Rows(*(getattr(rows, name)[order] for name in rows.__dataclass_fields__))

    def mined(rows: Rows, logits: torch.Tensor) -> set[tuple[int, int, bool]]:
        pairs = mine_pairs(
            logits, relations(rows, related, paper=False), rows.soma_joinid_G, torch.arange(n), seed=3, step=4
        )
        joinid = rows.soma_joinid_G
        return {
            (int(joinid[c]), int(joinid[t]), bool(m))
            for c, t, m in zip(pairs.cell_P, pairs.text_P, pairs.match_P, strict=True)
        }

    assert mined(rows, logits) == mined(shuffled, logits[order][:, order])


def test_hard_draws_follow_exp_of_the_logits() -> None:
    """Over 4,000 steps the share of each column is its softmax weight, within 4 standard errors."""
    rows = Rows(
        torch.arange(4),
        torch.arange(4),
        torch.full((4,), -1),
        torch.arange(4),
        torch.zeros(4, dtype=torch.bool),
    )
    relation = relations(rows, torch.zeros(0, 0, dtype=torch.bool), paper=False)
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0], [0.5, 9.0, 0, 0], [1.5, 0, 9.0, 0], [2.5, 0, 0, 9.0]])
    steps = 4000
    texts, cells = torch.zeros(4), torch.zeros(4)
    for step in range(steps):
        pairs = mine_pairs(logits, relation, rows.soma_joinid_G, torch.tensor([0]), seed=0, step=step)
        texts[pairs.text_P[1]] += 1
        cells[pairs.cell_P[2]] += 1
    for counts, row in ((texts, logits[0]), (cells, logits[:, 0])):
        expected = torch.cat([torch.zeros(1), row[1:].softmax(0)])
        assert (
            (counts / steps - expected).abs() < 4 * (expected * (1 - expected) / steps).sqrt() + 1e-9
        ).all()


def test_seeded_subset_takes_the_same_number_of_each_lane() -> None:
    joinid = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    chosen = initiators(joinid, lanes=3, cells=2, seed=1, step=5)
    assert [int(((chosen >= v * 8) & (chosen < v * 8 + 8)).sum()) for v in range(3)] == [2, 2, 2]
    assert not torch.equal(chosen, initiators(joinid, lanes=3, cells=2, seed=1, step=6))
