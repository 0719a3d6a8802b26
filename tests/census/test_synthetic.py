"""The generated Census keeps the laws that its module states, and is a function of its parameters."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cellxgene_ontology_guide.ontology_parser import OntologyParser

from langcell.census.experiment import Census
from langcell.census.options import CensusOptions
from langcell.census.slices import make_slices
from langcell.census.synthetic import LAW, build_synthetic, draw_counts, draw_obs
from langcell.text.describe import describe
from langcell.text.ontology import Ontology
from langcell.text.options import FACETS, TextOptions

CELLS = 51_200


@pytest.fixture(scope="module")
def obs() -> pa.Table:
    return draw_obs(CELLS, seed=0)


@pytest.fixture(scope="module")
def texts(obs: pa.Table) -> np.ndarray:
    """Number of each cell's combination of facets."""
    ids = [obs[f"{facet}_ontology_term_id"].combine_chunks().indices.to_numpy() for facet in FACETS]
    return np.unique(np.stack(ids, axis=1), axis=0, return_inverse=True)[1].ravel()


@pytest.mark.parametrize(("batch", "census"), [(32, 31.3), (1024, 706)])
def test_texts_repeat_as_in_the_census(texts: np.ndarray, batch: int, census: float) -> None:
    """Distinct texts of a shuffled batch, mean of the batches of one epoch."""
    shuffled = np.random.default_rng(0).permutation(texts)
    batches = shuffled[: CELLS // batch * batch].reshape(-1, batch)
    assert np.mean([len(np.unique(each)) for each in batches]) == pytest.approx(census, rel=0.01)


def test_texts_are_as_many_as_their_combinations(obs: pa.Table, texts: np.ndarray) -> None:
    """Every term is one that the ontologies define under this label, so no two texts become one."""
    some = np.unique(texts, return_index=True)[1][:2_000]
    rows = obs.take(some).to_pylist()
    ontology, options = Ontology.load(TextOptions()), TextOptions()
    written = [
        describe({f: (row[f], row[f"{f}_ontology_term_id"]) for f in FACETS}, ontology, options)
        for row in rows
    ]
    assert len({each.text for each in written}) == len(rows)
    assert not any(each.unresolved for each in written)
    assert len(np.unique(texts)) < LAW.texts


def test_terms_are_current_and_labels_theirs(obs: pa.Table) -> None:
    parser = OntologyParser()
    for facet in FACETS:
        pairs = zip(obs[facet].to_pylist(), obs[f"{facet}_ontology_term_id"].to_pylist(), strict=True)
        for label, term in sorted(set(pairs)):
            for one_label, one in zip(label.split(" || "), term.split(" || "), strict=True):
                if one != "unknown":
                    assert parser.get_term_label(one) == one_label
                    assert not parser.is_term_deprecated(one)
    assert any("||" in term for term in obs["disease_ontology_term_id"].unique().to_pylist())


def test_datasets_stand_together_and_primary_data_in_runs(obs: pa.Table) -> None:
    dataset = obs["dataset_id"].combine_chunks().indices.to_numpy()
    assert np.count_nonzero(np.diff(dataset)) + 1 == len(np.unique(dataset)) > 150
    primary = obs["is_primary_data"].to_numpy()
    assert primary.mean() == pytest.approx(LAW.primary, abs=0.05)
    changes = np.flatnonzero(np.diff(primary))
    assert len(changes) <= LAW.datasets // LAW.run
    assert (dataset[changes] != dataset[changes + 1]).all()
    donors = set(zip(obs["donor_id"].to_pylist(), dataset.tolist(), strict=True))
    assert len(donors) == len(obs["donor_id"].unique()), "a donor belongs to one dataset"


def test_counts_are_spread_as_in_real_cells() -> None:
    counts = next(draw_counts(4_096, seed=0))
    nnz = np.diff(counts.indptr)
    assert nnz.mean() == pytest.approx(1_670, rel=0.03)
    assert np.log(nnz).std() == pytest.approx(0.7, abs=0.05)
    # Zheng 2017 and Kang 2018 (3,874 and 2,000 PBMCs): 68%; 85-87%; 1.5-2.3%.
    assert (counts.data == 1).mean() == pytest.approx(0.68, abs=0.02)
    assert (counts.data <= 3).mean() == pytest.approx(0.86, abs=0.02)
    assert 0.01 < (counts.data >= 19).mean() < 0.025
    frequency = np.sort(counts.getnnz(axis=0) / 4_096)[::-1]
    assert frequency[10] > 0.95
    assert 0.2 < frequency[1_000] < 0.5
    assert 20_000 < np.count_nonzero(frequency) <= LAW.expressed
    assert counts.shape == (4_096, LAW.genes)
    assert counts.has_canonical_format


def test_a_block_depends_on_its_number_alone() -> None:
    short, long = list(draw_counts(4_500, seed=3)), list(draw_counts(9_000, seed=3))
    assert [block.shape[0] for block in long] == [4_096, 4_096, 808]
    assert (short[0] != long[0]).nnz == 0
    assert (short[0][:100] != long[1][:100]).nnz > 0
    assert (next(draw_counts(100, seed=4)) != next(draw_counts(100, seed=3))).nnz > 0


def test_a_census_holds_what_was_drawn_and_is_written_once(tmp_path: Path) -> None:
    uri = build_synthetic(str(tmp_path), 300, seed=1)
    (drawn,) = draw_counts(300, seed=1)
    with Census.open(CensusOptions(uri=uri, filter="")) as census:
        cells = census.obs(["cell_type", "dataset_id"])
        (whole,) = make_slices(cells, 10**9)
        raw = census.reader(whole)
        feature_id = census.var()["feature_id"].to_pylist()
    assert raw.fits.all()
    assert (raw.counts != drawn).nnz == 0
    np.testing.assert_array_equal(raw.totals, np.asarray(drawn.sum(axis=1)).ravel())
    assert cells["cell_type"].to_pylist() == draw_obs(300, seed=1)["cell_type"].to_pylist()
    assert all(len(gene) == 15 and gene.startswith("ENSG9") for gene in feature_id)
    assert len(set(feature_id)) == LAW.genes

    before = {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")}
    assert build_synthetic(str(tmp_path), 300, seed=1) == uri
    assert {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")} == before
    assert build_synthetic(str(tmp_path), 200, seed=1) != uri
    assert len(os.listdir(tmp_path)) == 2


def test_cells_of_a_dataset_are_neighbours_in_small_ones_too() -> None:
    dataset = draw_obs(50, seed=5)["dataset_id"].to_pylist()
    assert sum(a != b for a, b in pairwise(dataset)) + 1 == len(set(dataset))
