"""The mini Census is a Census: layout, types, ontology terms, and the cells that scanpy ships."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import anndata
import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma as soma
from cellxgene_ontology_guide.ontology_parser import OntologyParser

from langcell.census import demo, layout
from langcell.errors import InputError

CATEGORY = pa.dictionary(pa.int8(), pa.large_string())
# Census schema 2.4.0, in the builder's order.
OBS = [
    ("soma_joinid", pa.int64()),
    ("dataset_id", CATEGORY),
    ("assay", CATEGORY),
    ("assay_ontology_term_id", CATEGORY),
    ("cell_type", CATEGORY),
    ("cell_type_ontology_term_id", CATEGORY),
    ("development_stage", CATEGORY),
    ("development_stage_ontology_term_id", CATEGORY),
    ("disease", CATEGORY),
    ("disease_ontology_term_id", CATEGORY),
    ("donor_id", CATEGORY),
    ("is_primary_data", pa.bool_()),
    ("observation_joinid", pa.large_string()),
    ("self_reported_ethnicity", CATEGORY),
    ("self_reported_ethnicity_ontology_term_id", CATEGORY),
    ("sex", CATEGORY),
    ("sex_ontology_term_id", CATEGORY),
    ("suspension_type", CATEGORY),
    ("tissue", CATEGORY),
    ("tissue_ontology_term_id", CATEGORY),
    ("tissue_type", CATEGORY),
    ("tissue_general", CATEGORY),
    ("tissue_general_ontology_term_id", CATEGORY),
    ("raw_sum", pa.float64()),
    ("nnz", pa.int64()),
    ("raw_mean_nnz", pa.float64()),
    ("raw_variance_nnz", pa.float64()),
    ("n_measured_vars", pa.int64()),
]
VAR = [
    ("soma_joinid", pa.int64()),
    ("feature_id", pa.large_string()),
    ("feature_name", pa.large_string()),
    ("feature_type", pa.large_string()),
    ("feature_length", pa.int64()),
    ("nnz", pa.int64()),
    ("n_measured_obs", pa.int64()),
]
FACETS = [
    "assay",
    "cell_type",
    "development_stage",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "tissue",
    "tissue_general",
]


@pytest.fixture(scope="module")
def census(demo_uri: str) -> soma.Collection:
    with cellxgene_census.open_soma(uri=demo_uri) as census:
        yield census


@pytest.fixture(scope="module")
def source() -> anndata.AnnData:
    path = Path(importlib.util.find_spec("scanpy").origin).parent / "datasets/10x_pbmc68k_reduced.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def test_columns_and_types_are_those_of_a_release(census: soma.Collection) -> None:
    human = census["census_data"]["homo_sapiens"]
    assert [(f.name, f.type) for f in human.obs.schema] == OBS
    assert [(f.name, f.type) for f in human.ms["RNA"].var.schema] == VAR
    x_raw = human.ms["RNA"].X["raw"]
    assert x_raw.schema.field("soma_data").type == pa.float32()
    tuning = x_raw.schema_config_options()
    assert (tuning.capacity, tuning.cell_order, tuning.tile_order) == (65_536, "row-major", "row-major")
    assert tuning.allows_duplicates
    summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert summary["census_schema_version"] == "2.4.0"
    assert summary["total_cell_count"] == "700"


def test_value_filters_match_categories(census: soma.Collection, source: anndata.AnnData) -> None:
    obs = census["census_data"]["homo_sapiens"].obs
    for label, n in source.obs["bulk_labels"].value_counts().items():
        term = demo.DEMO_TYPES[label]
        rows = obs.read(
            value_filter=f'cell_type_ontology_term_id == "{term}" and is_primary_data == True',
            column_names=["soma_joinid"],
        ).concat()
        expected = np.flatnonzero(source.obs["bulk_labels"] == label)
        assert len(rows) == n
        np.testing.assert_array_equal(np.sort(rows["soma_joinid"]), expected)


def test_counts_are_the_integers_behind_the_shipped_values(
    census: soma.Collection, source: anndata.AnnData
) -> None:
    human = census["census_data"]["homo_sapiens"]
    read = cellxgene_census.get_anndata(census, "Homo sapiens")
    counts = sp.csr_matrix(read.X, dtype=np.float64)
    assert counts.shape == (700, 765)
    assert counts.nnz == 174_400
    totals = source.obs["n_counts"].to_numpy(np.float64)
    again = counts.copy()
    again.data = np.log1p(counts.data * 1e4 / np.repeat(totals, np.diff(counts.indptr)))
    # Shipped to three decimals; the largest count, 259, off by one would be off by 0.0039 here.
    np.testing.assert_allclose(again.toarray(), source.raw.X.toarray(), rtol=0, atol=5.01e-4)
    obs = human.obs.read().concat().to_pandas().sort_values("soma_joinid")
    np.testing.assert_array_equal(obs["raw_sum"], totals)
    inside = np.asarray(counts.sum(axis=1)).ravel()
    assert (inside <= totals).all()
    assert (inside / totals).max() < 0.28  # the file holds 765 genes of many
    np.testing.assert_array_equal(obs["nnz"], np.diff(counts.indptr))
    np.testing.assert_allclose(obs["raw_mean_nnz"], inside / obs["nnz"])
    dense = np.where(counts.toarray() == 0, np.nan, counts.toarray())
    np.testing.assert_allclose(obs["raw_variance_nnz"], np.nanvar(dense, axis=1, ddof=1))
    var = human.ms["RNA"].var.read().concat().to_pandas()
    assert list(var["feature_id"]) == list(source.raw.var_names)
    assert var["feature_id"].is_unique
    np.testing.assert_array_equal(var["nnz"], counts.getnnz(axis=0))


def test_facets_carry_labels_of_the_ontology_releases(census: soma.Collection) -> None:
    ontology = OntologyParser()
    obs = census["census_data"]["homo_sapiens"].obs.read().concat().to_pandas()
    for facet in FACETS:
        for label, term in set(zip(obs[facet], obs[f"{facet}_ontology_term_id"], strict=True)):
            if term == "unknown":
                assert facet in {"sex", "self_reported_ethnicity"}
                assert label == "unknown"
            else:
                assert label == ontology.get_term_label(term)
                assert not ontology.is_term_deprecated(term)
    assert obs["cell_type"].nunique() == 10


def test_a_second_builder_that_comes_late_is_dropped(
    tmp_path: Path, demo_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def beaten(whole: str, target: str) -> None:
        shutil.copytree(demo_uri, target)  # the other one finishes between our check and our rename
        rename(whole, target)

    monkeypatch.setattr(layout.os, "rename", beaten)
    uri = demo.build_demo(str(tmp_path / "census"))
    assert os.listdir(tmp_path) == ["census"]
    with cellxgene_census.open_soma(uri=uri) as census:
        assert census["census_data"]["homo_sapiens"].obs.count == 700


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_frame = layout.write_frame

    def dies(parent: soma.Collection, name: str, table: pa.Table) -> None:
        write_frame(parent, name, table)
        if name == "obs":
            raise OSError("disk full")

    monkeypatch.setattr(layout, "write_frame", dies)
    with pytest.raises(OSError, match="disk full"):
        demo.build_demo(str(tmp_path / "census"))
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    demo.build_demo(str(tmp_path / "census"))


def test_what_stands_in_the_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "census").mkdir()
    (tmp_path / "census" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"census\.dir"):
        demo.build_demo(str(tmp_path / "census"))
    assert (tmp_path / "census" / "mine.txt").read_text() == "keep"


def test_another_file_under_the_same_name_is_refused(
    source: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = source.copy()
    changed.obs["n_counts"] = changed.obs["n_counts"] * 1.01
    monkeypatch.setattr(demo.anndata, "read_h5ad", lambda path: changed)
    with pytest.raises(RuntimeError, match="off integers"):
        demo.build_demo(str(tmp_path / "census"))


def test_without_scanpy_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"langcell\[demo\]"):
        demo.build_demo(str(tmp_path / "census"))
