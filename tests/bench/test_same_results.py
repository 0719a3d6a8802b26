"""The baselines make the same sentences and medians as ours, from RAM and from a Census on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from langcell.bench import baselines, work
from langcell.bench.data import cells_of, count_differing, encoder_of, sentences_of
from langcell.bench.work import Cells
from langcell.cells.beta import Beta
from langcell.cells.rank import rank_encode
from langcell.census.synthetic import build_synthetic
from langcell.corpus.options import CorpusOptions
from langcell.corpus.token_pass import Encoder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """400 generated cells, in slices of about 100."""
    folder = str(tmp_path_factory.mktemp("bench"))
    cells = cells_of(build_synthetic(folder, 400, seed=0), CorpusOptions(test_share=0, val_share=0), 180_000)
    assert len(cells.slices) > 3
    return cells


@pytest.fixture(scope="module")
def stored(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("stored") / "cells.npz")
    work.save_cells(cells, path)()
    return path


@pytest.fixture(scope="module")
def medians(cells: Cells) -> tuple[Beta, dict[str, float]]:
    return work.beta_road(cells)()


@pytest.fixture(scope="module")
def encoder(medians: tuple[Beta, dict[str, float]]) -> Encoder:
    return encoder_of(medians[0])


def test_all_cells_are_read_and_trained_on(cells: Cells) -> None:
    assert (cells.n_cells, cells.ranges[0][0], cells.ranges[-1][1]) == (400, 0, 400)
    assert work.RawRead(cells, [(0, 250), (250, 400)])() == cells.nnz
    assert all(part.cells["split"].to_pylist() == [0] * len(part.cells) for part in cells.slices)
    some = cells.first(len(cells.slices[0].cells) + 1)
    assert some.slices == cells.slices[:2]


def test_medians_are_numpys(stored: str, medians: tuple[Beta, dict[str, float]]) -> None:
    beta, stages = medians
    expected = work.numpy_medians(stored)()
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(beta.beta, expected)
    np.testing.assert_array_equal(work.own_medians(stored)(), expected)
    assert set(stages) == {"read", "csr", "histogram", "collect", "merge"}
    counts, _, ends = work.load_cells(stored)
    np.testing.assert_array_equal(beta.n_nonzero, counts.getnnz(axis=0))
    assert ends[-1] == 400


def test_tokens_are_the_most_frequent_genes(medians: tuple[Beta, dict[str, float]], encoder: Encoder) -> None:
    n_nonzero = medians[0].n_nonzero
    known = encoder.token_by_var > 0
    assert known.sum() == encoder.genes == min(25_424, np.count_nonzero(n_nonzero))
    assert n_nonzero[known].min() >= n_nonzero[~known].max()
    assert sorted(encoder.token_by_var[known]) == list(range(2, encoder.cls))


@pytest.mark.parametrize(
    ("name", "options"),
    [("dense_loop", {}), ("dense_loop", {"chunk": 64}), ("sparse_loop", {})],
    ids=["langcell", "langcell in chunks", "geneformer"],
)
def test_loops_from_ram_make_the_kernels_sentences(
    stored: str, encoder: Encoder, name: str, options: dict[str, int]
) -> None:
    offsets, tokens = work.kernel(stored, encoder)()
    ours = np.split(tokens, offsets[1:-1])
    theirs = work.loop(name, stored, encoder, True, options)()
    assert count_differing(ours, theirs) == 0
    assert max(map(len, ours)) == encoder.max_length
    by_chance = getattr(baselines, name)(*work.load_cells(stored)[:2], encoder, False, **options)
    for a, b in zip(ours, by_chance, strict=True):  # its own order of equal values is another, no more
        assert len(a) == len(b)
    with pytest.raises(RuntimeError, match="cells have other tokens"):
        count_differing(ours, by_chance)


def test_the_blockwise_road_makes_the_sentences_of_the_blocks(
    cells: Cells, encoder: Encoder, tmp_path: Path
) -> None:
    some = cells.first(150)
    stages = work.token_road(some, encoder, str(tmp_path))()
    assert set(stages) == {"read", "csr", "tokens", "write"}
    written = sentences_of(tmp_path)
    assert len(written) == some.n_cells
    assert count_differing(written, work.blockwise_road(some, encoder, True)()) == 0
    by_chance = baselines.blockwise_road(
        str(cells.census.uri),
        some.n_cells,
        np.concatenate([part.cells["raw_sum"].to_numpy() for part in some.slices]),
        encoder,
        False,
    )
    assert [len(sentence) for sentence in by_chance] == [len(sentence) for sentence in written]


def test_one_other_token_is_noticed() -> None:
    counts = sp.csr_matrix(np.array([[1, 2, 0], [0, 3, 1]], np.float32))
    encoder = Encoder(np.ones(3), np.array([2, 3, 4], np.uint16), 5, 10)
    offsets, tokens = rank_encode(counts, np.full(2, 9.0), np.ones(3), encoder.token_by_var, 5, 10)
    theirs = baselines.dense_loop(counts, np.full(2, 9.0), encoder, True)
    assert [sentence.tolist() for sentence in theirs] == [[5, 3, 2], [5, 3, 4]]
    tokens[-1] = 2
    with pytest.raises(RuntimeError, match="1 of 2 cells"):
        count_differing(np.split(tokens, offsets[1:-1]), theirs)
