"""beta is numpy.median to the last bit, whatever the slices and the order of merging."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from langcell.cells.beta import (
    Beta,
    collect,
    finish,
    histogram,
    median_bins,
    merge_histograms,
)
from langcell.errors import InputError


def medians(counts: sp.csr_matrix, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference: one numpy.median a gene over the float32 values, by a dense loop."""
    dense = counts.toarray().astype(np.float64)
    value = (dense / totals[:, None] * 1e4).astype(np.float32)
    n = (dense > 0).sum(axis=0)
    beta = [np.median(value[dense[:, g] > 0, g]) if n[g] else np.nan for g in range(dense.shape[1])]
    return n, np.array(beta, np.float32)


def compute(counts: sp.csr_matrix, totals: np.ndarray, cuts: list[int], seed: int) -> Beta:
    """Both passes over the slices that `cuts` make, merged by a random tree in random order."""
    rng = np.random.default_rng(seed)
    bounds = [0, *sorted(cuts), counts.shape[0]]
    slices = [(counts[a:b], totals[a:b]) for a, b in pairwise(bounds)]

    def merged(parts: list, merge: object) -> object:
        while len(parts) > 1:
            rng.shuffle(parts)
            take = int(rng.integers(2, len(parts) + 1))
            parts = [merge(parts[:take]), *parts[take:]]
        return merge(parts)

    hist = merged([histogram(*s) for s in slices], merge_histograms)
    bins = median_bins(hist, counts.shape[1])
    collected = merged([collect(*s, bins) for s in slices], merge_histograms)
    genes = [f"G{g}" for g in range(counts.shape[1])]
    return finish(hist, bins, collected, genes, genes)


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


@given(corpus=corpora(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_beta_is_the_median_whatever_the_slices(
    corpus: tuple[sp.csr_matrix, np.ndarray, list[int]], seed: int
) -> None:
    counts, totals, cuts = corpus
    n, expected = medians(counts, totals)
    got = compute(counts, totals, cuts, seed)
    assert got.beta.dtype == np.float32
    np.testing.assert_array_equal(got.n_nonzero, n)
    np.testing.assert_array_equal(got.beta, expected)  # bit for bit; NaN where there is none
    assert got.hash == compute(counts, totals, [], 0).hash


def test_order_of_cells_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    counts = sp.random(500, 20, 0.3, format="csr", random_state=rng)
    counts.data = np.ceil(counts.data * 30)
    totals = rng.integers(1_000, 9_000, 500).astype(np.float64)
    order = rng.permutation(500)
    assert compute(counts, totals, [], 0).hash == compute(counts[order], totals[order], [100, 250], 1).hash


def test_real_cells(shared: Path) -> None:
    import anndata

    counts = sp.csr_matrix(anndata.read_h5ad(shared / "zheng_facs_pbmc_counts.h5ad").X)
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()  # over all genes
    counts = counts[:, ::7]  # a seventh of the genes: the reference is slow
    got = compute(counts, totals, [100, 1_500, 3_000], 5)
    n, expected = medians(counts, totals)
    np.testing.assert_array_equal(got.n_nonzero, n)
    np.testing.assert_array_equal(got.beta, expected)


def test_stored_zeros_are_no_values() -> None:
    counts = sp.csr_matrix(np.array([[2.0, 1.0], [4.0, 1.0], [9.0, 1.0]], np.float32))
    counts.data[4] = 0  # cell 2, gene 0
    got = compute(counts, np.full(3, 100.0), [1], 0)
    assert got.n_nonzero.tolist() == [2, 3]
    assert got.beta.tolist() == [300, 100]


def test_passes_over_different_cells_are_noticed() -> None:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.integers(0, 4, (60, 4)).astype(np.float32))
    totals = np.full(60, 100.0)
    hist = histogram(counts, totals)
    bins = median_bins(hist, 4)
    short = collect(counts[:50], totals[:50], bins)
    with pytest.raises(RuntimeError, match="same cells"):
        finish(hist, bins, short, list("abcd"), list("abcd"))
    whole = collect(counts, totals, bins)
    twice = merge_histograms([whole, short])
    with pytest.raises(RuntimeError, match="same cells"):
        finish(hist, bins, twice, list("abcd"), list("abcd"))


@pytest.fixture
def artefact() -> Beta:
    beta = np.array([0.5, np.nan, 3.25], np.float32)
    return Beta(["E1", "E2", "E3"], ["A", "B", "B"], np.array([4, 0, 2**40]), beta, {"release": "2025-11-08"})


def test_artefact_comes_back_from_disk(artefact: Beta, tmp_path: Path) -> None:
    path = str(tmp_path / "beta.parquet")
    artefact.write(path)
    again = Beta.load(path)
    assert (again.feature_id, again.feature_name) == (artefact.feature_id, artefact.feature_name)
    np.testing.assert_array_equal(again.n_nonzero, artefact.n_nonzero)
    np.testing.assert_array_equal(again.beta, artefact.beta)
    assert (again.beta.dtype, again.n_nonzero.dtype) == (np.float32, np.int64)
    assert again.metadata == {"release": "2025-11-08"}
    assert again.hash == artefact.hash
    root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert Beta.read("beta.parquet", root).hash == artefact.hash
    assert Beta.read(f"file://{path}").hash == artefact.hash


def test_hash_is_of_the_content_alone(artefact: Beta) -> None:
    same = dataclasses.replace(artefact, metadata={"release": "stable"}, feature_name=["x", "y", "z"])
    assert same.hash == artefact.hash
    for change in (
        {"feature_id": ["E1", "E2", "E4"]},
        {"n_nonzero": np.array([4, 0, 3])},
        {"beta": np.nextafter(artefact.beta, np.float32(9))},
    ):
        assert dataclasses.replace(artefact, **change).hash != artefact.hash


def test_damage_and_other_files_are_refused(artefact: Beta, tmp_path: Path) -> None:
    path = str(tmp_path / "beta.parquet")
    artefact.write(path)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2), path)
    with pytest.raises(InputError, match="damaged"):
        Beta.read(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(InputError, match=r"not a beta\.parquet"):
        Beta.read(path)
    Path(path).write_text("text")
    with pytest.raises(InputError, match=r"not a beta\.parquet"):
        Beta.read(path)
    with pytest.raises(InputError, match=r"not a beta\.parquet"):
        Beta.read(str(tmp_path / "nothing.parquet"))


def test_geneformer_medians_load(shared: Path, tmp_path: Path) -> None:
    beta = Beta.load(str(shared / "geneformer" / "gene_median_dictionary.pkl"))
    with open(shared / "geneformer" / "gene_median_dictionary.pkl", "rb") as file:
        published = pickle.load(file)
    assert len(beta.feature_id) == 25_424
    assert dict(zip(beta.feature_id, beta.beta, strict=True)) == published  # no bit lost
    # Range as published with Geneformer V1.
    assert beta.beta.min() == pytest.approx(0.095, abs=5e-4)
    assert beta.beta.max() == pytest.approx(634, abs=1)
    assert not beta.n_nonzero.any()
    beta.write(str(tmp_path / "beta.parquet"))
    again = Beta.load(str(tmp_path / "beta.parquet"))
    np.testing.assert_array_equal(again.beta, beta.beta)
    assert again.hash == beta.hash


@pytest.mark.parametrize("medians", [{"E1": "1.0"}, {"E1": -1.0}, {"E1": float("nan")}, {"E1": 1}, {}])
def test_other_dictionaries_are_refused(tmp_path: Path, medians: dict[str, object]) -> None:
    path = tmp_path / "medians.pkl"
    path.write_bytes(pickle.dumps(medians))
    with pytest.raises(InputError, match="positive medians"):
        Beta.load(str(path))
