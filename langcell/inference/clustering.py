"""Clusters against labels: does an embedding fall into the types by itself?

k-means with as many clusters as there are types, on each space, over several seeds (ten starts each); ARI
and NMI of scikit-learn. The number of types is told to every space alike, so that what is compared is the
space and not a resolution that somebody chose.

Shape suffixes: N cells, G genes, P width of a space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

COMPONENTS = 50
"""Principal components of log-normalised counts (scanpy's number)."""


def principal_components(features_NG: csr_matrix, seed: int = 0) -> np.ndarray:
    """The first `COMPONENTS` (fewer of small data) principal components, float64 [N, P].

    features_NG: log-normalised counts (`baseline.log_features`); the matrix stays sparse.
    """
    components = min(COMPONENTS, min(features_NG.shape) - 1)
    return PCA(components, svd_solver="arpack", random_state=seed).fit_transform(features_NG)


def clustering(
    spaces: Mapping[str, np.ndarray], label_N: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Per space, ARI and NMI: mean over the seeds, and each.

    spaces: float [N, P] by name; label_N: types of the cells.
    """
    k = len(set(label_N))
    result: dict[str, dict[str, Any]] = {}
    for name, x_NP in spaces.items():
        found = [KMeans(k, n_init=10, random_state=seed).fit_predict(x_NP) for seed in seeds]
        scores = {
            "ari": [float(adjusted_rand_score(label_N, clusters)) for clusters in found],
            "nmi": [float(normalized_mutual_info_score(label_N, clusters)) for clusters in found],
        }
        result[name] = {
            measure: {"mean": float(np.mean(values)), "by_seed": values} for measure, values in scores.items()
        }
    return result
