"""beta has the same bits for any slicing, order and number of workers, through the tasks that compute it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langcell.census.slices import RawCells, Slice
from langcell.corpus.beta_pass import train_beta
from langcell.corpus.ledger import Ledger
from langcell.corpus.schema import TEST, TRAIN
from langcell.errors import InputError

GENES = 30


@dataclass(frozen=True)
class Array:
    """Counts in memory as a source; slices in `broken` fail as storage does, a number of times."""

    counts: sp.csr_matrix
    totals: np.ndarray
    broken: tuple[int, ...] = ()

    def __call__(self, part: Slice) -> RawCells:
        if part.index in self.broken:
            raise OSError("the disk is on fire")
        rows = part.cells["soma_joinid"].to_numpy()
        return RawCells(self.counts[rows], self.totals[rows], np.ones(len(rows), bool))

    def datasets(self, soma_joinid: np.ndarray) -> list[str]:
        return ["here"] * len(soma_joinid)


def corpus(seed: int) -> tuple[Array, pa.Table]:
    """Cells with many ties, a third of them not for training."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 200))
    dense = rng.poisson(rng.gamma(0.5, 2, GENES), (n, GENES)).astype(np.float32)
    dense[:, 0] += 1
    source = Array(sp.csr_matrix(dense), dense.sum(axis=1) + rng.integers(0, 3, n) * 50.0)
    cells = pa.table(
        {
            "soma_joinid": np.arange(n),
            "raw_sum": source.totals,
            "nnz": np.count_nonzero(dense, axis=1),
            "split": np.where(rng.random(n) < 0.7, TRAIN, TEST).astype(np.int8),
        }
    )
    return source, cells


def cut(cells: pa.Table, cuts: list[int]) -> list[Slice]:
    bounds = [0, *sorted(cuts), len(cells)]
    parts = [cells.slice(a, b - a) for a, b in pairwise(bounds) if b > a]
    return [Slice(i, 0, len(cells), part, sum(part["nnz"].to_pylist())) for i, part in enumerate(parts)]


def beta_of(source: Array, slices: list[Slice], policy: str = "error"):
    var = pa.table({"feature_id": [f"G{i}" for i in range(GENES)], "feature_name": ["g"] * GENES})
    return train_beta(source, 1, var, slices, Ledger(source, policy, len(source.totals)), {})


def expected(source: Array, cells: pa.Table) -> np.ndarray:
    """numpy.median of each gene's float32 values, by a dense loop over the train cells."""
    train = cells["split"].to_numpy() == TRAIN
    value = (source.counts.toarray() / source.totals[:, None] * 1e4).astype(np.float32)[train]
    return np.array([np.median(v[v > 0]) if (v > 0).any() else np.nan for v in value.T], np.float32)


@given(seed=st.integers(0, 2**32 - 1), n_slices=st.sampled_from([1, 2, 5]), data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_slicing_and_no_order_changes_a_bit(ray_session, seed: int, n_slices: int, data) -> None:
    source, cells = corpus(seed)
    cuts = st.lists(st.integers(1, len(cells) - 1), min_size=n_slices - 1, max_size=n_slices - 1, unique=True)
    slices = data.draw(st.permutations(cut(cells, data.draw(cuts))))
    got = beta_of(source, slices).beta
    np.testing.assert_array_equal(got.beta, expected(source, cells))
    assert got.hash == beta_of(source, cut(cells, [])).beta.hash


ALONE = """
import ray
from tests.corpus.test_beta_pass import beta_of, corpus, cut
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
for seed in range(3):
    source, cells = corpus(seed)
    print("hash", beta_of(source, cut(cells, [3, 7, 8, 15])).beta.hash)
"""


@pytest.mark.slow
def test_one_worker_and_four_give_the_same_bits(ray_session) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    alone = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("hash ")]
    four = [beta_of(source, cut(cells, [5, 11])).beta.hash for source, cells in map(corpus, range(3))]
    assert alone == four, done.stderr


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_any_number_of_slices_is_reduced(ray_session, n: int) -> None:
    source, cells = corpus(0)
    cells = cells.slice(0, min(n, len(cells)))
    got = beta_of(source, cut(cells, list(range(1, len(cells))))).beta
    small = Array(source.counts[: len(cells)], source.totals[: len(cells)])
    np.testing.assert_array_equal(got.beta, expected(small, cells))


def test_slices_that_cannot_be_read_are_named_or_have_no_part(ray_session) -> None:
    source, cells = corpus(1)
    slices = cut(cells, [5, 11])
    broken = replace(source, broken=(1,))
    first = slices[1].cells.filter(pa.array(slices[1].cells["split"].to_numpy() == TRAIN))["soma_joinid"][0]
    with pytest.raises(InputError, match=rf"soma_joinid {first} to \d+ \(dataset here; slice 1\).*on fire"):
        beta_of(broken, slices)
    got = beta_of(broken, slices, "skip")
    assert got.unreadable == [1]
    assert got.beta.hash == beta_of(source, [slices[0], slices[2]]).beta.hash
    with pytest.raises(InputError, match="no slice with train cells"):
        beta_of(replace(source, broken=(0, 1, 2)), slices, "skip")
