"""Batch integration by scib's measures (Luecken et al. 2022), with scib-metrics' implementation.

Two questions that pull against each other: are batches mixed (iLISI, graph connectivity, PCR, and BRAS, the
successor of the batch silhouette) and are types kept apart (label silhouette, isolated labels, cLISI,
k-means NMI and ARI)? All are 0 to 1, larger is better; each group is averaged, and the total is 0.4 of the
first and 0.6 of the second, as in scib. Of its measures kBET alone is left out: it takes 46 s a space of
2,000 cells on two busy cores, once compiled, all the others 27 s. Neighbours are exact, which costs 2 s.

An embedding that says nothing mixes batches perfectly: read the two groups together.

Shape suffixes: N cells, P width of a space.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.neighbors import NearestNeighbors

from langcell.errors import InputError

NEIGHBOURS = 90
"""Neighbours that LISI looks at; scib-metrics' number (cells)."""


def check_installed() -> None:
    """Raises InputError where scib-metrics is not installed."""
    if importlib.util.find_spec("scib_metrics") is None:
        raise InputError(
            "integration is measured by the package scib-metrics, which is not installed: "
            "pip install 'langcell[evaluate]', or leave the part out"
        )


def integration(
    spaces: Mapping[str, np.ndarray], label_N: Sequence[str], batch_N: Sequence[str], *, unintegrated: str
) -> dict[str, dict[str, float | None]]:
    """Per space, each measure, the two group means (`Bio conservation`, `Batch correction`) and `Total`.

    spaces: float [N, P] by name; unintegrated: the one that PCR compares the others with. A measure that
    cannot be had of these cells is None and left out of the means. Raises InputError where scib-metrics is
    not installed, for a single batch or type, and for `NEIGHBOURS` cells or fewer.
    """
    for what, values in (("batch", batch_N), ("type", label_N)):
        if len(set(values)) < 2:
            raise InputError(f"integration: all cells are of one {what}; two at least are needed")
    if len(label_N) <= NEIGHBOURS:
        raise InputError(
            f"integration: {len(label_N)} cells; more than {NEIGHBOURS} are needed, for as many neighbours"
        )
    check_installed()
    # Seconds to import, which only this part needs.
    from scib_metrics.benchmark import BatchCorrection, Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults

    cells = AnnData(
        obs=pd.DataFrame({"label": list(label_N), "batch": list(batch_N)}).set_index(
            np.arange(len(label_N)).astype(str)
        )
    )
    cells.obsm.update({name: np.asarray(x_NP, np.float32) for name, x_NP in spaces.items()})

    def neighbours(x_NP: np.ndarray, k: int) -> NeighborsResults:
        distances, indices = NearestNeighbors(n_neighbors=k).fit(x_NP).kneighbors(x_NP)
        return NeighborsResults(indices=indices, distances=distances)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark = Benchmarker(
            cells,
            batch_key="batch",
            label_key="label",
            embedding_obsm_keys=list(spaces),
            batch_correction_metrics=BatchCorrection(kbet_per_label=False),
            pre_integrated_embedding_obsm_key=unintegrated,
            progress_bar=False,
        )
        benchmark.prepare(neighbours)
        benchmark.benchmark()
        results = benchmark.get_results()
    return {
        name: {
            str(measure): None if pd.isna(value) else float(value)
            for measure, value in results.loc[name].items()
        }
        for name in spaces
    }
