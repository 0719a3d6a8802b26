"""The artefact: whole or refused, and published medians without a bit lost."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.errors import InputError


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
