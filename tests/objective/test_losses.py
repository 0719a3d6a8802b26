"""The four losses against slow, independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from langcell.objective import draws
from langcell.objective.contrastive import Temperature, cell_cell, cell_text
from langcell.objective.global_batch import Views
from langcell.objective.lanes import Lanes
from langcell.objective.masked_gene import mask_genes
from langcell.objective.negatives import Rows, relations
from tests.objective import toy


def _unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


def _rows(batch: object) -> Rows:
    b = batch
    return Rows(b.soma_joinid_B, b.text_id_B, b.term_B, b.text_row_B, b.short_B)  # type: ignore[attr-defined]


def test_cell_cell_is_infonce_over_all_columns() -> None:
    first, second, tau = _unit(3, 0), _unit(8, 1), 0.05
    expected = 0.0
    for i, column in enumerate([2, 3, 4]):
        similar = [float(first[i] @ second[j]) / tau for j in range(8)]
        expected -= similar[column] - math.log(sum(math.exp(s) for s in similar))
    loss = cell_cell(first, second, torch.tensor([2, 3, 4]), torch.tensor(tau))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_cell_text_counts_multiplicity_and_leaves_related_out() -> None:
    """A direct reading of the design: target uniform over columns of the same text, related columns
    out of the denominator, every column a cell's text."""
    batch, tau = toy.batch(), 0.1
    relation = relations(_rows(batch), torch.arange(8), toy.texts().related_CC, paper=False, of="cells")
    z, t = _unit(8, 0), _unit(8, 1)
    expected = 0.0
    related = {(0, 1), (1, 0)}
    for i in range(8):
        same = [j for j in range(8) if toy.TEXT[j] == toy.TEXT[i]]
        kept = []
        for j in range(8):
            terms = (toy.TERM[toy.TEXT[i]], toy.TERM[toy.TEXT[j]])
            shortened = terms[0] == terms[1] and toy.VARIANT[j] > 0
            if j in same or not (terms in related or shortened):
                kept.append(j)
        logits = {j: float(z[i] @ t[j]) / tau for j in range(8)}
        log_z = math.log(sum(math.exp(logits[j]) for j in kept))
        expected += sum(log_z - logits[j] for j in same) / len(same)
    loss = cell_text(z, t, relation.positive_RG, relation.excluded_RG, torch.tensor(tau))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_paper_preset_is_plain_clip() -> None:
    relation = relations(_rows(toy.batch()), torch.arange(8), toy.texts().related_CC, paper=True, of="cells")
    z, t = _unit(8, 0), _unit(8, 1)
    loss = cell_text(z, t, relation.positive_RG, relation.excluded_RG, torch.tensor(0.05))
    expected = F.cross_entropy(z @ t.T / 0.05, torch.arange(8), reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mining", ["exact", "balanced"])
def test_stage_two_matching_loss_equals_pairs_one_by_one(mining: str) -> None:
    """CTM through the stage equals the weighted sum over pairs evaluated alone from the mined list."""
    stage = toy.stage(2, ctm_mining=mining).eval()
    batch = toy.batch()
    with torch.no_grad():
        shares = stage(batch, 3)
        model, texts = stage.model, stage.texts
        z = model.project_cells(model.cell_states(batch.cells), batch.cells)
        t = model.project_texts(texts.packed.select(batch.text_row_B))
        views = Views(z, z, t, torch.tensor([0.05]))
        pairs = stage.compare(views, [batch], Lanes.here(), 3).pairs
        assert pairs is not None
        assert pairs.match_P.sum() == 8
        total = 0.0
        for cell, text_row, match, weight in zip(*vars(pairs).values(), strict=True):
            one = batch.cells.select(cell[None])
            states = model.cell_states(one)
            logits = model.match(
                states, one, texts.packed.select(text_row[None]), torch.zeros(1, dtype=torch.int64)
            )
            total += float(weight * F.cross_entropy(logits, match.long()[None]))
    assert float(shares["ctm"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("masked", "chunk"), [(0, 4), (1, 4), (4, 4), (5, 4), (9, 100)])
def test_gene_loss_in_chunks_is_cross_entropy(masked: int, chunk: int) -> None:
    head = toy.model().gene_head.double()
    target = torch.randint(2, toy.VOCAB, (masked,), generator=torch.Generator().manual_seed(1))
    found = []
    for whole in (True, False):
        states = torch.randn(masked, 16, generator=torch.Generator().manual_seed(2)).double()
        states.requires_grad_()
        head.zero_grad()
        loss = (
            F.cross_entropy(head(states), target, reduction="sum") if whole else head(states, target, chunk)
        )
        (3 * loss).backward()
        gradients = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
        found.append((loss.detach().double(), states.grad, gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)  # logits are float32
    assert found[0][2].keys() == found[1][2].keys()
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][name], rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        assert float(head(states, target, chunk)) == pytest.approx(float(found[0][0]), rel=1e-6)


def test_masking_follows_bert_and_never_touches_cls() -> None:
    """15% of the genes; of these 80% masked, 10% replaced, 10% kept: within 4 standard errors."""
    n, length = 200, 201
    rng = np.random.default_rng(0)
    from langcell.batch import Packed

    cells = Packed.from_sequences([np.r_[999, rng.integers(2, 999, length - 1)] for _ in range(n)])
    masked = mask_genes(cells, torch.arange(n), ratio=0.15, seed=1, step=2, cls=999)
    genes = n * (length - 1)
    share = masked.index_M.numel() / genes
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / genes)
    now, before = masked.cells.tokens_T, cells.tokens_T
    assert torch.equal(now[cells.starts_B], before[cells.starts_B])
    chosen = now[masked.index_M]
    m = masked.index_M.numel()
    for share, expected in (
        (float((chosen == 1).double().mean()), 0.8),
        (float((chosen == masked.target_M).double().mean()), 0.1),
    ):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / m) + 0.002
    untouched = torch.ones(before.numel(), dtype=torch.bool)
    untouched[masked.index_M] = False
    assert torch.equal(now[untouched], before[untouched])


def test_masks_belong_to_the_cell_not_to_the_batch() -> None:
    whole, half = toy.batch(), toy.batch(4, 4)
    a = mask_genes(whole.cells, whole.soma_joinid_B, ratio=0.3, seed=1, step=2, cls=toy.CLS)
    b = mask_genes(half.cells, half.soma_joinid_B, ratio=0.3, seed=1, step=2, cls=toy.CLS)
    start = int(whole.cells.starts_B[4])
    assert torch.equal(a.cells.tokens_T[start:], b.cells.tokens_T)
    other = mask_genes(whole.cells, whole.soma_joinid_B, ratio=0.3, seed=1, step=3, cls=toy.CLS)
    assert not torch.equal(a.index_M, other.index_M)


def test_hash_is_splitmix64() -> None:
    """Golden numbers: the first outputs of splitmix64 seeded with 0 and 1 (Vigna's reference code)."""
    reference = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    mixed = draws.mix(torch.tensor([0, 1]))
    assert [int(x) & ((1 << 64) - 1) for x in mixed] == reference


def test_uniform_is_uniform() -> None:
    """Kolmogorov-Smirnov distance of 20,000 draws below its 0.1% critical value."""
    drawn = draws.uniform(draws.hashed(3, torch.arange(20_000))).sort().values
    distance = (drawn - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert float(distance) < 1.95 / math.sqrt(20_000)
    assert drawn[0] > 0
    assert drawn[-1] < 1


def test_learnt_temperature_stays_in_its_range() -> None:
    temperature = Temperature(0.05, learnt=True)
    with torch.no_grad():
        temperature.log_tau_1.fill_(-50.0)
    tau = temperature(torch.device("cpu"))
    assert float(tau.detach()) == pytest.approx(0.01, rel=1e-4)
    tau.sum().backward()
    assert temperature.log_tau_1 is not None
    assert float(temperature.log_tau_1.grad) > 0  # and can come back
