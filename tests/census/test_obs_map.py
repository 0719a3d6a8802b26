"""An obs map says what a file's words mean; what it says wrongly is found, what it leaves out is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from langcell.census.obs_map import FileMap, ObsMap
from langcell.census.obs_words import TEXT, census_obs, unnamed_labels
from langcell.errors import InputError

WHOLE = """
columns: {cell_type: celltype, donor_id: sample, raw_sum: n_counts}
feature_id: ensembl
matrix: raw/X
labels:
  cell_type: {CD4 Naive T: CL:0000895, Doublet: null, 7: CL:0000236}
constants: {assay: EFO:0009901, dataset_id: kang, is_primary_data: false}
files:
  a.h5ad:
    columns: {cell_type: other, raw_sum: null}
    matrix: layers/counts
    labels: {cell_type: {Doublet: CL:0000084}}
    constants: {donor_id: D1}
  b.h5ad:
    columns: {assay: method}
"""


def read(tmp_path: Path, text: str) -> ObsMap:
    (tmp_path / "map.yaml").write_text(text)
    return ObsMap.read(str(tmp_path / "map.yaml"))


def words(frame: pd.DataFrame, of: FileMap | None = None) -> pd.DataFrame:
    return census_obs(frame, of or FileMap(), "study", "study.h5ad")[0]


def test_a_file_has_its_own_keys_over_the_common_ones(tmp_path: Path) -> None:
    whole = read(tmp_path, WHOLE)
    common = whole.of("c.h5ad")
    assert common.columns == {"cell_type": "celltype", "donor_id": "sample", "raw_sum": "n_counts"}
    assert common.labels == {"cell_type": {"CD4 Naive T": "CL:0000895", "Doublet": None, "7": "CL:0000236"}}
    assert common.constants == {"assay": "EFO:0009901", "dataset_id": "kang", "is_primary_data": False}
    assert (common.feature_id, common.matrix) == ("ensembl", "raw/X")
    a = whole.of("a.h5ad")
    assert a.columns == {"cell_type": "other"}  # raw_sum taken back, donor_id now a constant
    assert a.constants == {**common.constants, "donor_id": "D1"}
    assert a.labels["cell_type"] == {"CD4 Naive T": "CL:0000895", "Doublet": "CL:0000084", "7": "CL:0000236"}
    assert (a.feature_id, a.matrix) == ("ensembl", "layers/counts")
    b = whole.of("b.h5ad")
    assert b.columns == {**common.columns, "assay": "method"}
    assert "assay" not in b.constants


def test_the_digest_is_of_what_is_said(tmp_path: Path) -> None:
    one = read(tmp_path, "feature_id: x\ncolumns: {sex: a}\n").digest
    assert read(tmp_path, "# the same\ncolumns:\n  sex: a\nfeature_id: 'x'\n").digest == one
    assert read(tmp_path, "feature_id: x\ncolumns: {sex: b}\n").digest != one
    assert read(tmp_path, "feature_id: x\nfiles: {f: {columns: {sex: a}}}\n").digest != one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"map\.yaml cannot be read"),
        ("!!python/object/apply:os.system ['true']", r"map\.yaml cannot be read"),
        ("- a", "holds no keys"),
        ("", "holds no keys"),
        ("column: {a: b}", r"map\.yaml: unknown key column"),
        ("files: {f: {files: {}}}", r"map\.yaml, files, f: unknown key files"),
        ("files: {f: x}", r"files, f: 'x' is no set of keys"),
        ("files: [f]", "files: must name files"),
        ("columns: [a]", "columns"),
        ("columns:", "columns has nothing below it"),
        ("labels: {sex: }", "labels"),
        ("columns: {sex: 3}", "columns"),
        ("feature_id: [a]", "feature_id"),
        ("columns: {soma_joinid: id}", "columns: soma_joinid is made from the file"),
        ("columns: {yes: id}", "columns: True is no text; put it in quotes"),
        ("matrix: counts", "matrix: 'counts' is not X, raw/X or layers/NAME"),
        ("labels: {celltype: {}}", "labels: celltype is no facet"),
        ("labels: {cell_type: {a: {b: c}}}", "labels"),
        ("labels: {sex: {yes: PATO:0000383}}", "labels, sex: YAML reads a label as True"),
        ("labels: {sex: {1.5: PATO:0000383}}", "labels, sex: YAML reads a label as 1.5"),
        ("labels: {cell_type: {T: UBERON:1}}", "labels, cell_type, T: 'UBERON:1' is no ontology id of cell"),
        ("labels: {cell_type: {T: T cell}}", "labels, cell_type, T: 'T cell' is no ontology id"),
        ("labels: {disease: {x: MONDO:1 || y}}", "labels, disease, x: 'MONDO:1 || y' is no ontology id"),
        ("constants: {assay: 10x}", "constants, assay: '10x' is no ontology id of assay"),
        ("constants: {assay_ontology_term_id: EFO:1}", "assay_ontology_term_id: cannot be a constant"),
        ("constants: {raw_sum: '3'}", "raw_sum: cannot be a constant"),
        ("constants: {is_primary_data: x}", "is_primary_data: 'x' is not true or false"),
        ("constants: {donor_id: true}", "donor_id: True is not text"),
        ("constants: {sex: PATO:1}\ncolumns: {sex: a}", "sex stands under columns and under constants"),
        ("files: {f.h5ad: {constants: {tissue: liver}}}", r"files, f\.h5ad, constants, tissue: 'liver'"),
    ],
)
def test_bad_maps_say_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"census\.obs_map: .*{message}"):
        read(tmp_path, text)


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"census\.obs_map: .*none\.yaml cannot be read"):
        ObsMap.read(str(tmp_path / "none.yaml"))


def test_several_ids_and_unknown_are_allowed(tmp_path: Path) -> None:
    text = """
    labels: {disease: {both: "MONDO:0005812 || MONDO:0005249"}, development_stage: {P56: MmusDv:0000061}}
    constants: {sex: unknown, self_reported_ethnicity: AfPO:0000551}
    """
    common = read(tmp_path, text).common
    assert common.labels["disease"] == {"both": "MONDO:0005812 || MONDO:0005249"}
    assert common.constants["sex"] == "unknown"


def test_labels_and_files_that_are_not_there(tmp_path: Path) -> None:
    whole = read(tmp_path, WHOLE)
    labels = {"cell_type": {"CD4 Naive T", "Doublet", "7"}}
    whole.check_found({"a.h5ad": labels, "b.h5ad": {}})
    with pytest.raises(
        InputError, match=r"names the file b\.h5ad, which is not in the folder; it holds: a\.h5ad"
    ):
        whole.check_found({"a.h5ad": labels})
    with pytest.raises(
        InputError, match=r"map\.yaml, labels, cell_type: no cell has the label '7'.*'Doublet'"
    ):
        whole.check_found({"a.h5ad": {"cell_type": {"CD4 Naive T", "Doublet"}}, "b.h5ad": {}})
    with pytest.raises(
        InputError, match=r"files, a\.h5ad, labels, cell_type: no cell has the label 'Doublet'"
    ):
        whole.check_found({"a.h5ad": {}, "b.h5ad": labels})


def test_a_file_that_says_nothing_says_unknown() -> None:
    cells = words(pd.DataFrame(index=["x", "y"]))
    assert list(cells.columns) == [*TEXT, "is_primary_data"]
    for name in TEXT[:-2]:
        assert cells[name].tolist() == ["unknown"] * 2
    assert cells["dataset_id"].tolist() == cells["donor_id"].tolist() == ["study"] * 2
    assert cells["is_primary_data"].tolist() == [True, True]


def test_a_file_in_the_words_of_a_census_stays_as_it_is() -> None:
    frame = pd.DataFrame(
        {
            "cell_type": pd.Categorical(["T cell", "B cell", "T cell"]),
            "cell_type_ontology_term_id": ["CL:0000084", "CL:0000236", "CL:0000084"],
            "donor_id": [7, 7, 8],
            "dataset_id": ["d", None, "e"],
            "is_primary_data": pd.array([True, False, None], "boolean"),
            "raw_sum": np.array([10, 20, 30], np.int32),
            "score": [0.5, 0.25, 0.125],
        },
        index=["a", "a", "b"],
    )
    cells = words(frame)
    for name in ("cell_type", "cell_type_ontology_term_id", "score", "raw_sum"):
        assert cells[name].tolist() == frame[name].tolist()
    assert cells["donor_id"].tolist() == ["7", "7", "8"]
    assert cells["dataset_id"].tolist() == ["d", "study", "e"]
    assert cells["is_primary_data"].tolist() == [True, False, True]
    assert cells["raw_sum"].dtype == np.float64


def test_labels_get_ids_and_null_is_unknown() -> None:
    frame = pd.DataFrame({"celltype": ["T", "Doublet", "odd", None, "T"], "clusters": [1, 2, 3, 1, 2]})
    of = FileMap(
        columns={"cell_type": "celltype", "tissue": "clusters"},
        labels={"cell_type": {"T": "CL:0000084", "Doublet": None}, "tissue": {"1": "UBERON:0000178"}},
    )
    cells, found = census_obs(frame, of, "study", "study.h5ad")
    assert cells["cell_type"].tolist() == ["T", "unknown", "odd", "unknown", "T"]
    ids = ["CL:0000084", "unknown", "unknown", "unknown", "CL:0000084"]
    assert cells["cell_type_ontology_term_id"].tolist() == ids
    assert cells["tissue"].tolist() == ["1", "2", "3", "1", "2"]
    assert found == {"cell_type": {"T", "Doublet", "odd"}, "tissue": {"1", "2", "3"}}
    assert unnamed_labels(cells, of) == {"cell_type": Counter(odd=1), "tissue": Counter({"2": 2, "3": 1})}
    assert unnamed_labels(cells.iloc[:2], of) == {"tissue": Counter({"2": 1})}


def test_an_id_alone_leaves_the_label_open() -> None:
    cells = words(pd.DataFrame({"tissue_ontology_term_id": ["UBERON:0000178", None]}))
    assert cells["tissue_ontology_term_id"].tolist() == ["UBERON:0000178", "unknown"]
    assert cells["tissue"].isna().tolist() == [True, False]
    of = FileMap(
        constants={"tissue": "UBERON:0000955", "sex": "unknown", "is_primary_data": False, "lab": "x"}
    )
    cells = words(pd.DataFrame({"tissue": ["blood"], "tissue_ontology_term_id": ["UBERON:0000178"]}), of)
    assert cells["tissue_ontology_term_id"].tolist() == ["UBERON:0000955"]
    assert cells["tissue"].isna().all()
    assert cells["sex"].tolist() == ["unknown"]
    assert (cells["is_primary_data"].tolist(), cells["lab"].tolist()) == ([False], ["x"])


def test_ids_of_labels_that_are_replaced_go_with_them() -> None:
    frame = pd.DataFrame(
        {
            "cell_type": ["lymphocyte"],
            "cell_type_ontology_term_id": ["CL:0000542"],
            "author_cell_type": ["CD8"],
            "author_id": ["CL:0000625"],
        }
    )
    cells = words(frame, FileMap(columns={"cell_type": "author_cell_type"}))
    assert cells["cell_type_ontology_term_id"].tolist() == ["unknown"]
    both = {"cell_type": "author_cell_type", "cell_type_ontology_term_id": "author_id"}
    assert words(frame, FileMap(columns=both))["cell_type_ontology_term_id"].tolist() == ["CL:0000625"]


@pytest.mark.parametrize(
    ("frame", "of", "message"),
    [
        ({"a": ["x"]}, {"sex": "b"}, "obs has no column b, which census.obs_map names for sex. It has: a"),
        ({"is_primary_data": ["yes"]}, {}, "is_primary_data holds 'yes', not true or false"),
        ({"n": ["many"]}, {"raw_sum": "n"}, "raw_sum holds other things than numbers"),
    ],
)
def test_columns_of_a_wrong_kind_are_named(
    frame: dict[str, list[str]], of: dict[str, str | None], message: str
) -> None:
    with pytest.raises(InputError, match=rf"study\.h5ad: {message}"):
        words(pd.DataFrame(frame), FileMap(columns=of))
