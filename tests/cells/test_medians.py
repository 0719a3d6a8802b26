"""The medians are numpy.median's to the last bit, whatever the slices and the order of merging."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.cells.medians import (
    MOST_GENES,
    Histogram,
    collect,
    finish,
    gene_ranges,
    histogram,
    join_bins,
    median_bins,
    merge_collected,
    merge_histograms,
)


def reference(counts: sp.csr_matrix, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference: one numpy.median a gene over the float32 values, by a dense loop."""
    dense = counts.toarray().astype(np.float64)
    value = (dense / totals[:, None] * 1e4).astype(np.float32)
    n = (dense > 0).sum(axis=0)
    beta = [np.median(value[dense[:, g] > 0, g]) if n[g] else np.nan for g in range(dense.shape[1])]
    return n, np.array(beta, np.float32)


def compute(
    counts: sp.csr_matrix, totals: np.ndarray, cuts: list[int], seed: int, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Both passes over the slices that `cuts` make, by ranges of genes, each merged by a random tree in
    random order; number of values and median of each gene."""
    rng = np.random.default_rng(seed)
    bounds = [0, *sorted(cuts), counts.shape[0]]
    slices = [(counts[a:b], totals[a:b]) for a, b in pairwise(bounds)]
    ranges = gene_ranges(counts.shape[1], at_least)

    def merged(partials: list[list[Histogram]], merge: object) -> list[Histogram]:
        sums = []
        for parts in map(list, zip(*partials, strict=True)):
            while len(parts) > 1:
                rng.shuffle(parts)
                take = int(rng.integers(2, len(parts) + 1))
                parts = [merge(parts[:take]), *parts[take:]]
            sums.append(merge(parts))
        return sums

    counted = merged([histogram(*s, ranges) for s in slices], merge_histograms)
    bins = [median_bins(part) for part in counted]
    collected = merged([collect(*s, join_bins(bins), ranges) for s in slices], merge_collected)
    finished = [finish(*of_range) for of_range in zip(counted, bins, collected, strict=True)]
    n, median = (np.concatenate(arrays) for arrays in zip(*finished, strict=True))
    return n, median


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    """Equal numbers, and equal bits (NaN where there is none)."""
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1].view(np.uint32), b[1].view(np.uint32))


@st.composite
def corpora(draw: st.DrawFn) -> tuple[sp.csr_matrix, np.ndarray, list[int]]:
    n_cells, n_genes = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    entry = draw(
        st.sampled_from(
            [
                st.integers(0, 2),  # ties everywhere
                st.integers(0, 1) | st.integers(10**5, 10**7),  # middles far apart
                st.sampled_from([0, 1, 2, 4, 127, 128, 129, 255, 256, 257]),  # edges of bins
                st.just(3),
                st.integers(0, 2**24 - 1),
            ]
        )
    )
    cells = st.lists(entry, min_size=n_genes, max_size=n_genes)
    rows = np.array(draw(st.lists(cells, min_size=n_cells, max_size=n_cells)), np.float32)
    spare = st.sampled_from([0, 1, 128]) | st.integers(0, 10**6)
    extra = np.array(draw(st.lists(spare, min_size=n_cells, max_size=n_cells)), np.float64)
    totals = np.maximum(rows.sum(axis=1, dtype=np.float64) + extra, 1)
    if draw(st.booleans()):
        totals[:] = totals.max()  # equal totals: equal values
    cuts = draw(st.lists(st.integers(0, n_cells), max_size=6))
    return sp.csr_matrix(rows), totals, cuts


@given(corpus=corpora(), seed=st.integers(0, 2**32 - 1), at_least=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_medians_are_numpys_whatever_the_slices(
    corpus: tuple[sp.csr_matrix, np.ndarray, list[int]], seed: int, at_least: int
) -> None:
    counts, totals, cuts = corpus
    n, expected = reference(counts, totals)
    got = compute(counts, totals, cuts, seed, at_least)
    assert got[1].dtype == np.float32
    np.testing.assert_array_equal(got[0], n)
    np.testing.assert_array_equal(got[1], expected)  # bit for bit; NaN where there is none
    assert same(got, compute(counts, totals, [], 0))


def test_order_of_cells_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    counts = sp.random(500, 20, 0.3, format="csr", random_state=rng)
    counts.data = np.ceil(counts.data * 30)
    totals = rng.integers(1_000, 9_000, 500).astype(np.float64)
    order = rng.permutation(500)
    shuffled = compute(counts[order], totals[order], [100, 250], 1, at_least=3)
    assert same(compute(counts, totals, [], 0), shuffled)


def test_more_genes_than_a_code_can_number() -> None:
    rng = np.random.default_rng(4)
    n_genes = 2 * MOST_GENES + 17
    gene = np.array([0, 1, MOST_GENES - 1, MOST_GENES, MOST_GENES + 9, 2 * MOST_GENES, n_genes - 1])
    counts = np.zeros((40, n_genes), np.float32)
    counts[:, gene] = rng.integers(0, 90, (40, len(gene)))
    totals = rng.integers(8_000, 9_000, 40).astype(np.float64)
    assert len(gene_ranges(n_genes, 1)) == 4
    n, median = compute(sp.csr_matrix(counts), totals, [7, 30], 0)
    few_n, few = reference(sp.csr_matrix(counts[:, gene]), totals)
    np.testing.assert_array_equal(n[gene], few_n)
    np.testing.assert_array_equal(median[gene], few)
    assert n.sum() == few_n.sum()


def test_real_cells(shared: Path) -> None:
    import anndata

    counts = sp.csr_matrix(anndata.read_h5ad(shared / "zheng_facs_pbmc_counts.h5ad").X)
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()  # over all genes
    counts = counts[:, ::7]  # a seventh of the genes: the reference is slow
    n, got = compute(counts, totals, [100, 1_500, 3_000], 5, at_least=16)
    expected_n, expected = reference(counts, totals)
    np.testing.assert_array_equal(n, expected_n)
    np.testing.assert_array_equal(got, expected)


def test_stored_zeros_are_no_values() -> None:
    counts = sp.csr_matrix(np.array([[2.0, 1.0], [4.0, 1.0], [9.0, 1.0]], np.float32))
    counts.data[4] = 0  # cell 2, gene 0
    n, median = compute(counts, np.full(3, 100.0), [1], 0)
    assert n.tolist() == [2, 3]
    assert median.tolist() == [300, 100]


def test_passes_over_different_cells_are_noticed() -> None:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.integers(0, 4, (60, 4)).astype(np.float32))
    totals, ranges = np.full(60, 100.0), gene_ranges(4, 1)
    (hist,) = histogram(counts, totals, ranges)
    bins = median_bins(hist)
    (short,) = collect(counts[:50], totals[:50], bins, ranges)
    with pytest.raises(RuntimeError, match="same cells"):
        finish(hist, bins, short)
    (whole,) = collect(counts, totals, bins, ranges)
    with pytest.raises(RuntimeError, match="same cells"):
        finish(hist, bins, merge_collected([whole, short]))
