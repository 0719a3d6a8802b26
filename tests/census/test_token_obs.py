"""What a folder of token sentences says of its cells, in the words of a Census."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from langcell.errors import InputError
from langcell.text.options import FACETS
from tests.token_folders import LAYOUTS, Write, corpus, opened, save


@LAYOUTS
def test_obs_speaks_as_a_census_does(tmp_path: Path, write: Write) -> None:
    columns = {
        "cell_type": ["T cell", None, "B cell"] * 20,
        "cell_type_ontology_term_id": ["CL:0000084", "CL:0000236", "CL:0000236"] * 20,
        "tissue": pa.array([None] * 60, pa.string()),
        "sex": pa.nulls(60),
        "plate": pa.array([1, 2, None] * 20),
        "note": ["a", "b", "c"] * 20,
    }
    write(tmp_path / "blood", corpus(60, columns=columns))
    folder = opened(tmp_path / "blood")
    names = [
        *FACETS,
        "cell_type_ontology_term_id",
        "dataset_id",
        "donor_id",
        "is_primary_data",
        "plate",
        "note",
    ]
    obs = folder.obs(names)
    assert obs.column_names == ["soma_joinid", "raw_sum", "nnz", *names]
    text = pa.dictionary(pa.int32(), pa.string())
    for name in (*FACETS, "cell_type_ontology_term_id", "dataset_id", "donor_id", "note"):
        assert obs.schema.field(name).type == text, name
    assert obs["cell_type"].to_pylist() == columns["cell_type"]
    assert obs["cell_type_ontology_term_id"].to_pylist() == columns["cell_type_ontology_term_id"]
    for facet in ("tissue", "sex", "assay"):
        assert set(obs[facet].to_pylist()) == {"unknown"}
    assert set(obs["dataset_id"].to_pylist()) == set(obs["donor_id"].to_pylist()) == {"blood"}
    assert obs["is_primary_data"].to_pylist() == [True] * 60
    assert obs["plate"].to_pylist() == [1, 2, None] * 20
    assert obs["note"].to_pylist() == columns["note"]
    assert folder.obs(["sex"]).num_rows == 60


def test_datasets_of_cells_are_named(tmp_path: Path) -> None:
    ids = [f"study {i // 50}" for i in range(200)]
    save(tmp_path / "c", corpus(columns={"dataset_id": ids}))
    folder = opened(tmp_path / "c")
    assert folder.datasets(np.array([3, 49, 50, 199])) == ["study 0", "study 0", "study 1", "study 3"]
    assert folder.datasets(np.empty(0, np.int64)) == []
    save(tmp_path / "nameless", corpus())
    assert opened(tmp_path / "nameless").datasets(np.array([0, 199])) == ["nameless"] * 2


@LAYOUTS
def test_a_class_label_is_its_name(tmp_path: Path, write: Write) -> None:
    numbers = [0, 2, -1, 1] * 10
    table = corpus(40, columns={"cell_type": numbers})
    feature = {"names": ["B cell", "T cell", "monocyte"], "_type": "ClassLabel"}
    about = {"info": {"features": {"cell_type": feature}}}
    write(tmp_path / "c", table.replace_schema_metadata({"huggingface": json.dumps(about)}))
    obs = opened(tmp_path / "c").obs(["cell_type"])
    assert obs["cell_type"].to_pylist() == ["B cell", "monocyte", "unknown", "T cell"] * 10
    assert len(opened(tmp_path / "c", 'cell_type == "T cell"').obs([])) == 10


def test_the_map_gives_columns_labels_and_constants(tmp_path: Path) -> None:
    columns = {"celltype": ["T", "B", "doublet", "odd"] * 10, "sample": np.arange(40) // 20}
    save(tmp_path / "c", corpus(40, columns=columns))
    words = tmp_path / "map.yaml"
    words.write_text(
        "columns: {cell_type: celltype, donor_id: sample}\n"
        "labels: {cell_type: {T: CL:0000084, B: CL:0000236, doublet: null}}\n"
        "constants: {assay: EFO:0009922, dataset_id: kept}\n"
    )
    folder = opened(tmp_path / "c", 'cell_type_ontology_term_id != "unknown"', str(words))
    obs = folder.obs(["cell_type", "assay_ontology_term_id", "dataset_id", "donor_id", "celltype"])
    assert obs["cell_type"].to_pylist() == ["T", "B"] * 10
    assert obs["celltype"].to_pylist() == ["T", "B"] * 10
    assert set(obs["assay_ontology_term_id"].to_pylist()) == {"EFO:0009922"}
    assert set(obs["dataset_id"].to_pylist()) == {"kept"}
    assert obs["donor_id"].to_pylist() == ["0"] * 10 + ["1"] * 10
    assert opened(tmp_path / "c", "", str(words)).remarks["labels_unmapped"] == {"cell_type": {"odd": 10}}
    assert folder.release["obs_map"] != opened(tmp_path / "c").release["obs_map"] is None

    words.write_text("labels: {cell_type: {T: CL:0000084}}\ncolumns: {cell_type: cluster}")
    with pytest.raises(InputError, match=r"map\.yaml names the column cluster for cell_type.*celltype"):
        opened(tmp_path / "c", obs_map=str(words))
    words.write_text("labels: {cell_type: {NK: CL:0000623}}\ncolumns: {cell_type: celltype}")
    with pytest.raises(InputError, match=r"no cell has the label 'NK'.*'doublet'"):
        opened(tmp_path / "c", obs_map=str(words))


@pytest.mark.parametrize(
    ("filter", "says"),
    [
        ("cell_type ==", r"census\.filter .*cannot be applied"),
        ("no_such == 1", r"no column no_such. It has: .*cell_type"),
        ("n_counts == 'many'", r"census\.filter .*matches no cell"),
        ("cell_type == 'b cell'", r"census\.filter .*matches no cell"),
        ("states == 1", r"column states is list"),
    ],
)
def test_a_wrong_filter_is_named(tmp_path: Path, filter: str, says: str) -> None:
    columns = {"cell_type": ["B cell"] * 20, "n_counts": np.arange(20), "states": [[1]] * 20}
    save(tmp_path / "c", corpus(20, columns=columns))
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "c", filter)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    save(tmp_path / "c", corpus(20, columns={"batch": ["x"] * 20}))
    with pytest.raises(InputError, match=r"no column phase.*batch"):
        opened(tmp_path / "c").obs(["cell_type", "phase"])
