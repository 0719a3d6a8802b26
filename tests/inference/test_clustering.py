"""Clusters of a space whose types lie apart are the types; of noise they are not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from langcell.inference.clustering import clustering, principal_components


def test_types_that_lie_apart_are_found_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    label_N = np.repeat(["a", "b", "c"], [60, 30, 10])
    centre = {"a": (9, 0), "b": (0, 9), "c": (-9, -9)}
    apart = np.array([centre[name] for name in label_N]) + random.normal(size=(100, 2))
    found = clustering({"apart": apart, "noise": random.normal(size=(100, 2))}, label_N, [0, 1])
    assert found["apart"]["ari"] == {"mean": pytest.approx(1), "by_seed": pytest.approx([1, 1])}
    assert found["apart"]["nmi"]["mean"] == pytest.approx(1)
    assert abs(found["noise"]["ari"]["mean"]) < 0.15


def test_components_are_those_of_centred_counts() -> None:
    counts = sp.random(20, 60, 0.4, random_state=1, format="csr")
    found = principal_components(counts)
    assert found.shape == (20, 19)  # fewer than 50 can be had
    dense = counts.toarray() - counts.toarray().mean(0)
    distance = np.linalg.norm(dense[:, None] - dense[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), distance, atol=1e-6)
