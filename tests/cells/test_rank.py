"""Sentences equal those of a slow float64 implementation, ties by var order."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.cells.beta import Beta
from langcell.cells.rank import rank_encode
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError


def slow(
    counts: sp.csr_matrix, totals: np.ndarray, beta: np.ndarray, token: np.ndarray, cls: int, length: int
) -> list[list[int]]:
    """One cell, one gene at a time; Python's sort is stable and sees (-value, place in var)."""
    sentences = []
    for cell in range(counts.shape[0]):
        row = counts[[cell]].toarray().astype(np.float64).ravel()
        ranked = []
        for gene in np.flatnonzero(row):
            if token[gene] and np.isfinite(beta[gene]):
                ranked.append((-((row[gene] / totals[cell] * 10_000) / beta[gene]), gene))
        sentences.append([cls, *(int(token[gene]) for _, gene in sorted(ranked))][:length])
    return sentences


def sentences_of(offsets: np.ndarray, tokens: np.ndarray) -> list[list[int]]:
    assert offsets.dtype == np.int64
    assert tokens.dtype == np.uint16
    assert (offsets[0], offsets[-1]) == (0, len(tokens))
    return [tokens[a:b].tolist() for a, b in pairwise(offsets)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray, np.ndarray, int]:
    n_cells, n_genes = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = draw(st.sampled_from([1, 3, 100, 2**20]))
    counts = sp.csr_matrix(rng.integers(0, top + 1, (n_cells, n_genes)).astype(np.float32))
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel() + rng.integers(1, 10**4, n_cells)
    beta = rng.choice(
        draw(
            st.sampled_from(
                [
                    [1.0],
                    [1.0, 2.0, 3.0, 4.0],
                    # values whose float32 images are equal and whose float64 are not
                    [1.0, 1.0 + 2**-30, 1.0 + 2**-40, 1.0 - 2**-45],
                    [1e-3, 0.7, 634.0, np.nan, np.inf],
                ]
            )
        ),
        n_genes,
    )
    token = np.arange(2, 2 + n_genes).astype(np.uint16)
    token[rng.random(n_genes) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    return counts, totals, beta, token, draw(st.sampled_from([2, 3, 10, 2048]))


@given(problem=problems())
@settings(max_examples=400, deadline=None)
def test_sentences_are_the_slow_ones(
    problem: tuple[sp.csr_matrix, np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    counts, totals, beta, token, length = problem
    got = sentences_of(*rank_encode(counts, totals, beta, token, 999, length))
    assert got == slow(counts, totals, beta, token, 999, length)


def test_ties_keep_the_order_of_var() -> None:
    counts = sp.csr_matrix(np.array([[2, 4, 1, 3, 6]], np.float32))
    beta = np.array([2.0, 4.0, 1.0, 1.5, 6.0])  # all 1 but the fourth, 2
    token = np.array([9, 3, 7, 4, 5], np.uint16)
    _, tokens = rank_encode(counts, np.array([16.0]), beta, token, 99, 10)
    assert tokens.tolist() == [99, 4, 9, 3, 7, 5]


def test_unsorted_rows_make_the_same_sentence() -> None:
    rng = np.random.default_rng(1)
    counts = sp.csr_matrix(rng.integers(0, 3, (20, 50)).astype(np.float32))
    shuffled = counts.copy()
    for cell in range(20):
        row = slice(*counts.indptr[cell : cell + 2])
        order = rng.permutation(row.stop - row.start)
        shuffled.indices[row], shuffled.data[row] = counts.indices[row][order], counts.data[row][order]
    shuffled = sp.csr_matrix((shuffled.data, shuffled.indices, shuffled.indptr), counts.shape)
    token = np.arange(2, 52).astype(np.uint16)
    args = (np.full(20, 100.0), np.ones(50), token, 99, 30)
    assert sentences_of(*rank_encode(shuffled, *args)) == sentences_of(*rank_encode(counts, *args))


def test_stored_zeros_and_empty_cells() -> None:
    counts = sp.csr_matrix(np.array([[1, 2], [0, 0], [3, 0]], np.float32))
    counts.data[0] = 0
    token = np.array([2, 3], np.uint16)
    offsets, tokens = rank_encode(counts, np.full(3, 5.0), np.ones(2), token, 99, 10)
    assert sentences_of(offsets, tokens) == [[99, 3], [99], [99, 2]]
    offsets, tokens = rank_encode(counts[:0], np.empty(0), np.ones(2), token, 99, 10)
    assert (offsets.tolist(), tokens.tolist()) == ([0], [])


def test_the_input_stays_as_it_was() -> None:
    counts = sp.csr_matrix(np.array([[1, 2, 3]], np.float32))
    for array in (counts.data, counts.indices, counts.indptr):
        array.flags.writeable = False  # as they come out of an Arrow block
    beta, token = np.ones(3), np.array([2, 0, 4], np.uint16)
    rank_encode(counts, np.array([6.0]), beta, token, 99, 10)
    assert beta.tolist() == [1, 1, 1]
    assert token.tolist() == [2, 0, 4]


def test_a_sentence_holds_a_gene() -> None:
    counts = sp.csr_matrix(np.ones((1, 1), np.float32))
    with pytest.raises(InputError, match=r"tokens\.max_length"):
        rank_encode(counts, np.ones(1), np.ones(1), np.array([2], np.uint16), 99, 1)


def zheng(shared: Path) -> tuple[sp.csr_matrix, np.ndarray, list[str]]:
    import anndata

    data = anndata.read_h5ad(shared / "zheng_facs_pbmc_counts.h5ad")
    counts = sp.csr_matrix(data.X)
    return counts, np.asarray(counts.sum(axis=1), np.float64).ravel(), data.var_names.tolist()


def vectorised(
    counts: sp.csr_matrix, totals: np.ndarray, beta: np.ndarray, token: np.ndarray, cls: int, length: int
) -> tuple[list[list[int]], int]:
    """Independent of the kernel, quick enough for 3,874 cells: lexsort of (var order, -value)."""
    sentences, with_ties = [], 0
    for cell in range(counts.shape[0]):
        gene = counts.indices[counts.indptr[cell] : counts.indptr[cell + 1]]
        x = counts.data[counts.indptr[cell] : counts.indptr[cell + 1]].astype(np.float64)
        keep = (token[gene] > 0) & np.isfinite(beta[gene])
        gene, value = gene[keep], (x[keep] / totals[cell] * 10_000) / beta[gene[keep]]
        order = np.lexsort((gene, -value))
        sentences.append([cls, *token[gene[order]].tolist()][:length])
        with_ties += len(np.unique(value)) < len(value)
    return sentences, with_ties


@pytest.mark.parametrize("length", [2048, 128])
def test_real_cells_with_medians_of_their_own(shared: Path, length: int) -> None:
    counts, totals, _ = zheng(shared)
    by_gene = sp.csc_matrix(counts)
    total_of = totals[by_gene.indices]
    value = (by_gene.data.astype(np.float64) / total_of * 10_000).astype(np.float32)
    beta = np.array([np.median(v) if len(v) else np.nan for v in np.split(value, by_gene.indptr[1:-1])])
    token = np.arange(2, 2 + counts.shape[1]).astype(np.uint16)
    expected, with_ties = vectorised(counts, totals, beta, token, 20_000, length)
    assert with_ties > 0.9 * len(expected)  # or the tie rule would not be tested
    assert sentences_of(*rank_encode(counts, totals, beta, token, 20_000, length)) == expected


def test_real_cells_with_geneformers_medians(shared: Path) -> None:
    counts, totals, genes = zheng(shared)
    folder = shared / "geneformer"
    vocabulary = Vocabulary.load(str(folder / "token_dictionary.pkl"))
    medians = Beta.load(str(folder / "gene_median_dictionary.pkl"))
    median_of = dict(zip(medians.feature_id, medians.beta, strict=True))
    beta = np.array([median_of.get(gene, np.nan) for gene in genes])
    with open(folder / "gene_median_dictionary.pkl", "rb") as file:
        published = pickle.load(file)
    beta_published = np.array([published.get(gene, np.nan) for gene in genes])
    token = vocabulary.tokens_of(genes)
    assert (token > 0).sum() == 13_907  # of 16,791 genes
    expected, _ = vectorised(counts, totals, beta_published, token, vocabulary.cls, 2048)
    assert sentences_of(*rank_encode(counts, totals, beta, token, vocabulary.cls, 2048)) == expected
