"""A folder of .h5ad files is what anndata reads of them, in one numbering and one list of genes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from cellxgene_ontology_guide.ontology_parser import OntologyParser

from langcell.cells.pickles import read_pickle_dict
from langcell.census import h5ad_matrix
from langcell.census.h5ad import H5adFolder
from langcell.census.options import CensusOptions
from langcell.census.slices import RawCells, make_slices
from langcell.errors import InputError
from langcell.text.describe import describe
from langcell.text.ontology import Ontology
from langcell.text.options import FACETS, TextOptions

THREE = {
    "zheng_facs_pbmc_counts.h5ad": 3_874,
    "ifnb_kang_pbmc_counts.h5ad": 2_000,
    "atlas_landmarks_human_counts.h5ad": 830,
}
IDS = [f"ENSG{i:011d}" for i in range(60)]


def counts_of(cells: int, genes: int, seed: int) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = sp.random(cells, genes, 0.3, format="csr", dtype=np.float32, random_state=rng)
    counts.data = rng.integers(1, 90, counts.nnz).astype(np.float32)
    return counts


def write(
    folder: Path, name: str, counts: Any, genes: list[str], obs: dict[str, Any] | None = None, **parts: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    frame = pd.DataFrame(obs or {}, index=[f"{name}-{i}" for i in range(counts.shape[0])])
    data = ad.AnnData(counts, frame, pd.DataFrame(index=pd.Index(genes)), **parts)
    data.write_h5ad(folder / name)
    return folder / name


def open_folder(folder: Path, **options: Any) -> H5adFolder:
    return H5adFolder.open(CensusOptions(uri=str(folder), **{"filter": "", **options}))


def read_all(folder: H5adFolder, max_nnz: int = 10**6, columns: tuple[str, ...] = ()) -> RawCells:
    """All cells, slice by slice, through a reader that travelled."""
    slices = make_slices(folder.obs(columns), max_nnz)
    reader = pickle.loads(pickle.dumps(folder.reader))
    parts = [reader(part) for part in slices]
    for raw in parts:
        assert raw.counts.dtype == np.float32
        assert raw.counts.has_sorted_indices
        assert (raw.counts.data != 0).all()
    return RawCells(
        sp.vstack([raw.counts for raw in parts], format="csr"),
        np.concatenate([raw.totals for raw in parts]),
        np.concatenate([raw.fits for raw in parts]),
    )


def as_frame(raw: RawCells, folder: H5adFolder) -> pd.DataFrame:
    return pd.DataFrame(raw.counts.toarray(), columns=folder.var()["feature_id"].to_pylist())


def yaml_map(tmp_path: Path, content: dict[str, Any]) -> str:
    (tmp_path / "map.yaml").write_text(json.dumps(content))
    return str(tmp_path / "map.yaml")


def symbols_table(tmp_path: Path, pairs: dict[str, str]) -> str:
    (tmp_path / "symbols.tsv").write_text("".join(f"{name}\t{gene}\n" for name, gene in pairs.items()))
    return str(tmp_path / "symbols.tsv")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two files of 30 and 50 cells, whose genes overlap and stand in other orders."""
    folder = tmp_path / "two"
    order = np.random.default_rng(2).permutation(40)
    write(
        folder,
        "b.h5ad",
        counts_of(50, 40, 1),
        [IDS[i] for i in order],
        {"cell_type": ["T"] * 25 + ["B"] * 25},
    )
    write(folder, "a.h5ad", counts_of(30, 30, 0), IDS[30:], {"score": np.arange(30) / 10})
    return folder


@pytest.mark.parametrize("max_nnz", [10**6, 200, 1])
def test_two_files_are_what_anndata_joins(two: Path, max_nnz: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5ad_matrix, "_PIECE", 150)
    folder = open_folder(two)
    joined = ad.concat([ad.read_h5ad(two / name) for name in ("a.h5ad", "b.h5ad")], join="outer")
    expected = pd.DataFrame(joined.X.toarray(), columns=joined.var_names)
    expected = expected[sorted(expected.columns)].fillna(0)
    raw = read_all(folder, max_nnz)
    pd.testing.assert_frame_equal(as_frame(raw, folder), expected, check_names=False)
    np.testing.assert_array_equal(raw.totals, expected.sum(axis=1))
    assert raw.fits.all()
    obs = folder.obs(["cell_type", "dataset_id", "score"])
    assert obs["soma_joinid"].to_pylist() == list(range(80))
    assert obs["nnz"].to_pylist() == (expected > 0).sum(axis=1).tolist()
    assert np.isnan(obs["raw_sum"]).all()
    assert obs["cell_type"].to_pylist() == ["unknown"] * 30 + ["T"] * 25 + ["B"] * 25
    assert obs["score"].to_pylist() == [*(np.arange(30) / 10), *[None] * 50]
    assert obs.schema.field("dataset_id").type == pa.dictionary(pa.int32(), pa.string())
    assert folder.datasets(np.array([3, 29, 30, 79])) == ["a", "a", "b", "b"]
    assert folder.datasets(np.array([40])) == ["b"]


@pytest.mark.parametrize("gap", [0, 10, 10**6])
def test_filtered_cells_keep_their_numbers(two: Path, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5ad_matrix, "_GAP", gap)
    folder = open_folder(two, filter='cell_type == "B" or score in [0.3, 2.9]')
    joinid = folder.obs([])["soma_joinid"].to_numpy()
    assert joinid.tolist() == [3, 29, *range(55, 80)]
    everything = read_all(open_folder(two)).counts.toarray()
    np.testing.assert_array_equal(read_all(folder).counts.toarray(), everything[joinid])
    np.testing.assert_array_equal(read_all(folder, max_nnz=30).counts.toarray(), everything[joinid])


def test_scattered_cells(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set of rows, whatever is read over and wherever pieces end."""
    everything = read_all(open_folder(two)).counts
    folder = open_folder(two)
    cells = folder.obs([])
    rng = np.random.default_rng(0)
    for gap, piece in [(0, 7), (15, 60), (40, 10**6), (10**6, 10**6)]:
        monkeypatch.setattr(h5ad_matrix, "_GAP", gap)
        monkeypatch.setattr(h5ad_matrix, "_PIECE", piece)
        for share in (0.1, 0.5, 0.9):
            rows = np.flatnonzero(rng.random(80) < share)
            [part] = make_slices(cells.take(rows), 10**6)
            np.testing.assert_array_equal(folder.reader(part).counts.toarray(), everything[rows].toarray())


@pytest.mark.parametrize("kind", ["dense", "float64", "int32", "int64 indices", "gzip"])
def test_however_a_matrix_is_stored(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5ad_matrix, "_PIECE", 500)
    counts = counts_of(40, 60, 3)
    counts = sp.diags_array((np.arange(40) != 7).astype(np.float32)) @ counts  # row 7 is empty
    counts = sp.csr_matrix(counts, dtype=np.float32)
    counts.eliminate_zeros()
    stored = {
        "dense": counts.toarray(),
        "float64": counts.astype(np.float64),
        "int32": counts.astype(np.int32),
    }.get(kind, counts)
    path = write(tmp_path / kind, "a.h5ad", stored, IDS)
    with h5py.File(path, "r+") as file:
        if kind == "int64 indices":
            indices = file["X/indices"][:].astype(np.int64)
            del file["X/indices"]
            file["X/indices"] = indices
        if kind == "gzip":
            data = file["X/data"][:]
            del file["X/data"]
            file["X"].create_dataset("data", data=data, compression="gzip", chunks=(64,))
    folder = open_folder(tmp_path / kind)
    assert folder.obs([])["nnz"].to_pylist() == np.diff(counts.indptr).tolist()
    raw = read_all(folder, max_nnz=300)
    np.testing.assert_array_equal(raw.counts.toarray(), counts.toarray())
    np.testing.assert_array_equal(raw.totals, np.asarray(counts.sum(axis=1)).ravel())
    some = folder.obs([]).take([3, 4, 7, 30])
    [part] = make_slices(some, 10**6)
    np.testing.assert_array_equal(folder.reader(part).counts.toarray(), counts[[3, 4, 7, 30]].toarray())


def test_tables_of_anndata_0_7(tmp_path: Path) -> None:
    """Categories as they were written until 0.8: codes that refer to a table of their own."""
    path = write(tmp_path / "f", "a.h5ad", counts_of(3, 60, 3), IDS)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "_index"})
        obs.attrs["column-order"] = np.array(["cell_type"], h5py.string_dtype())
        obs["_index"] = np.array(["a", "b", "c"], h5py.string_dtype())
        obs["__categories/cell_type"] = np.array(["T", "B"], h5py.string_dtype())
        obs["cell_type"] = np.array([1, -1, 0], np.int8)
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
    assert open_folder(tmp_path / "f").obs(["cell_type"])["cell_type"].to_pylist() == ["B", "unknown", "T"]


def test_unsorted_repeated_and_stored_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "f", "a.h5ad", sp.csr_matrix(np.eye(2, 4, dtype=np.float32)), IDS[:4])
    with h5py.File(path, "r+") as file:
        for name, values in {
            "indptr": np.array([0, 4, 6], np.int32),
            "indices": np.array([3, 0, 3, 1, 2, 0], np.int32),
            "data": np.array([5, 1, 2, 0, 4, 9], np.float32),
        }.items():
            del file["X"][name]
            file["X"][name] = values
    folder = open_folder(tmp_path / "f")
    raw = read_all(folder)
    np.testing.assert_array_equal(raw.counts.toarray(), [[1, 0, 0, 7], [9, 0, 4, 0]])
    assert raw.counts.nnz == 4
    assert folder.obs([])["nnz"].to_pylist() == [4, 2]  # the most there may be
    assert raw.fits.all()


def test_symbols_are_summed_and_totals_are_over_all_genes(tmp_path: Path) -> None:
    names = ["one", "alias", "spike", "two", f"{IDS[2]}.4"]
    write(tmp_path / "f", "a.h5ad", sp.csr_matrix(np.arange(1.0, 11, dtype=np.float32).reshape(2, 5)), names)
    table = symbols_table(tmp_path, {"one": IDS[1], "alias": IDS[1], "two": IDS[0]})
    folder = open_folder(tmp_path / "f", symbols=table)
    assert folder.var().to_pydict() == {
        "soma_joinid": [0, 1, 2],
        "feature_id": IDS[:3],
        "feature_name": ["two", "one", IDS[2]],
    }
    raw = read_all(folder)
    np.testing.assert_array_equal(raw.counts.toarray(), [[4, 3, 5], [9, 13, 10]])
    assert raw.totals.tolist() == [15, 40]
    assert folder.remarks["genes_without_id"] == {"a.h5ad": 1}
    assert folder.remarks["genes_duplicated"] == {"a.h5ad": 0}


def test_a_duplicated_gene_is_an_error_or_left_out(tmp_path: Path) -> None:
    counts = sp.csr_matrix(np.array([[1, 2, 4]], np.float32))
    with pytest.warns(UserWarning, match="not unique"):
        write(tmp_path / "f", "a.h5ad", counts, [IDS[0], IDS[1], IDS[0]])
    with pytest.raises(InputError, match=rf"a\.h5ad: var has {IDS[0]} 2 times .*duplicated feature_id"):
        open_folder(tmp_path / "f")
    folder = open_folder(tmp_path / "f", bad_cells="skip")
    assert folder.var()["feature_id"].to_pylist() == [IDS[1]]
    assert folder.remarks["genes_duplicated"] == {"a.h5ad": 2}
    raw = read_all(folder)
    assert (raw.counts.toarray().tolist(), raw.totals.tolist()) == ([[2]], [7])


def test_stated_totals_go_before_sums(tmp_path: Path) -> None:
    counts = sp.csr_matrix(np.ones((2, 3), np.float32))
    write(tmp_path / "f", "a.h5ad", counts, IDS[:3], {"raw_sum": [30, 40]})
    write(tmp_path / "f", "b.h5ad", counts, IDS[:3], {"n_counts": [50.0, np.nan], "raw_sum": [1, 1]})
    write(tmp_path / "f", "c.h5ad", counts, IDS[:3])
    columns = {"b.h5ad": {"columns": {"raw_sum": "n_counts"}}}
    folder = open_folder(tmp_path / "f", obs_map=yaml_map(tmp_path, {"files": columns}))
    np.testing.assert_array_equal(folder.obs([])["raw_sum"], [30, 40, 50, np.nan, np.nan, np.nan])
    # A total that the file should state and does not is no total; it is not guessed.
    np.testing.assert_array_equal(read_all(folder).totals, [30, 40, 50, np.nan, 3, 3])


def test_what_is_no_count_shows_in_the_total(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [0.5, 0.5, 1], [1, 1, -2], [np.nan, 1, 1], [np.inf, 1, 1], [4, 4, 4], [2, 2, 1]]
    names = ["one", "alias", "spike"]
    write(tmp_path / "f", "a.h5ad", sp.csr_matrix(np.array(rows, np.float32)), names)
    table = symbols_table(tmp_path, {"one": IDS[0], "alias": IDS[0]})
    raw = read_all(open_folder(tmp_path / "f", symbols=table))
    np.testing.assert_array_equal(raw.totals, [6, np.nan, np.nan, np.nan, np.nan, 12, 5])
    assert raw.fits.all()
    assert np.isnan(raw.counts[3, 0])
    assert np.isinf(raw.counts[4, 0])


def test_a_row_that_is_not_as_promised_does_not_fit(two: Path) -> None:
    folder = open_folder(two)
    [part] = make_slices(folder.obs([]), 10**6)
    before = folder.reader(part).counts.toarray()
    with h5py.File(two / "a.h5ad", "r+") as file:
        file["X/indptr"][5] += 1  # rows 4 and 5
        file["X/indices"][file["X/indptr"][10]] = 30  # row 10: there are 30 genes
        file["X/indices"][file["X/indptr"][20]] = -1
    raw = folder.reader(part)
    wrong = [4, 5, 10, 20]
    assert np.flatnonzero(~raw.fits).tolist() == wrong
    assert np.isnan(raw.totals[wrong]).all()
    before[wrong] = 0
    np.testing.assert_array_equal(raw.counts.toarray(), before)
    (two / "b.h5ad").unlink()
    with pytest.raises(OSError, match=r"b\.h5ad"):
        folder.reader(part)


def test_raw_and_layers(tmp_path: Path) -> None:
    counts = counts_of(6, 5, 0)
    whole = ad.AnnData(counts, var=pd.DataFrame(index=IDS[:5]))
    some = whole[:, :3].copy()
    some.raw = whole
    some.layers["doubled"] = some.X * 2
    some.X = some.X / 3.7
    (tmp_path / "f").mkdir()
    some.write_h5ad(tmp_path / "f" / "a.h5ad")
    with pytest.raises(
        InputError, match=r"a\.h5ad: X holds no raw counts .*`matrix: raw/X` in census\.obs_map"
    ):
        open_folder(tmp_path / "f")
    folder = open_folder(tmp_path / "f", obs_map=yaml_map(tmp_path, {"matrix": "raw/X"}))
    assert folder.var()["feature_id"].to_pylist() == IDS[:5]  # of raw/var
    np.testing.assert_array_equal(read_all(folder).counts.toarray(), counts.toarray())
    folder = open_folder(tmp_path / "f", obs_map=yaml_map(tmp_path, {"matrix": "layers/doubled"}))
    np.testing.assert_array_equal(read_all(folder).counts.toarray(), 2 * counts[:, :3].toarray())
    with pytest.raises(InputError, match=r"no matrix layers/x\. It has: X, raw/X, layers/doubled"):
        open_folder(tmp_path / "f", obs_map=yaml_map(tmp_path, {"matrix": "layers/x"}))


def test_raw_look_at_a_dense_matrix(tmp_path: Path) -> None:
    write(tmp_path / "f", "a.h5ad", np.full((3, 4), 0.5, np.float32), IDS[:4])
    with pytest.raises(
        InputError, match=r"X holds no raw counts \(0\.5, \.\.\.\) .*give a file with raw counts"
    ):
        open_folder(tmp_path / "f")


def test_one_bad_cell_is_left_to_the_check_of_cells(tmp_path: Path) -> None:
    counts = counts_of(20, 30, 0)
    counts.data[3] = 0.5
    write(tmp_path / "f", "a.h5ad", counts, IDS[:30])
    assert read_all(open_folder(tmp_path / "f")).counts.data[3] == 0.5


def test_columns_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "f", "a.h5ad", counts_of(4, 5, 0).tocsc(), IDS[:5])
    with pytest.raises(InputError, match=r"a\.h5ad: X is stored by columns \(CSC\).*tocsr"):
        open_folder(tmp_path / "f")


def damage(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:4000])
        return
    if how == "no HDF5":
        path.write_text("no HDF5")
        return
    with h5py.File(path, "r+") as file:
        if how == "no obs":
            del file["obs"]
        elif how == "old obs":
            del file["obs"]
            file["obs"] = np.zeros(30, [("index", "S4"), ("n_genes", "i8")])
        elif how == "no X":
            del file["X"]
        elif how == "form":
            file["X"].attrs["encoding-type"] = "coo_matrix"
        elif how == "no indptr":
            del file["X/indptr"]
        elif how == "text":
            del file["X"]
            file["X"] = np.full((30, 30), b"x")
        elif how == "shape":
            file["X"].attrs["shape"] = [30, 31]
        elif how == "indptr":
            file["X/indptr"][3] = 10**6
        elif how == "data":
            data = file["X/data"][:-1]
            del file["X/data"]
            file["X/data"] = data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read as .h5ad: .*damaged, cut or another format"),
        ("no HDF5", "cannot be read as .h5ad"),
        ("no obs", "cannot be read as .h5ad: .*obs"),
        ("old obs", "obs is no table as anndata writes since 0.7. Write the file anew"),
        ("no X", "has no matrix X. It has: none"),
        ("form", "X is stored as coo_matrix; CSR or a dense array is expected"),
        ("no indptr", "X is damaged: it does not consist of arrays of numbers"),
        ("text", "X is damaged: it does not consist of arrays of numbers"),
        ("shape", r"X has the shape \[30 31\], but obs has 30 cells and var 30 genes"),
        ("indptr", "X is damaged: its indptr does not fit its 270 entries"),
        ("data", "X is damaged: its indptr does not fit its 269 entries"),
    ],
)
def test_damaged_files_are_named(two: Path, how: str, message: str) -> None:
    damage(two / "a.h5ad", how)
    with pytest.raises(InputError, match=rf"a\.h5ad:? {message}"):
        open_folder(two)


def test_a_damaged_file_at_reading_is_an_os_error(two: Path) -> None:
    folder = open_folder(two)
    [part] = make_slices(folder.obs([]), 10**6)
    damage(two / "b.h5ad", "cut")
    with pytest.raises(OSError, match="truncated"):
        folder.reader(part)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "/no/such/folder"}, "census.uri /no/such/folder cannot be read: No such file"),
        ({"organism": "rattus"}, "census.organism is 'rattus'; .h5ad files may be of homo_sapiens, mus"),
        ({"organism": "mus_musculus"}, r"gene ENSG\d+ is not of mus_musculus"),
        ({"filter": "cell_type =="}, r"census.filter 'cell_type ==' cannot be applied to obs of .*two: "),
        (
            {"filter": "cell_type.x == 1"},
            "Attribute is not part of a filter.*It compares columns with values",
        ),
        ({"filter": "score < 'x'"}, r"cannot be applied to obs of .*a\.h5ad"),
        ({"filter": "author == 'x'"}, "has no column author. It has: score, cell_type"),
        ({"filter": "cell_type == 'X'"}, "census.filter .* matches no cell of .*two. Loosen it"),
        ({"symbols": "/no/such.tsv"}, "census.symbols: /no/such.tsv cannot be read"),
        ({"obs_map": "/no/such.yaml"}, "census.obs_map: /no/such.yaml cannot be read"),
    ],
)
def test_bad_options_are_named(two: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        H5adFolder.open(CensusOptions(**{"uri": str(two), "filter": "", **options}))


def test_columns_and_files_that_are_not_there(two: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"obs of .*two has no column author, x\. It has: score, cell_type"):
        open_folder(two).obs(["cell_type", "author", "x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"census\.uri .*empty holds no \.h5ad file"):
        open_folder(tmp_path / "empty")
    labels = {"labels": {"cell_type": {"T": "CL:0000084", "NK": "CL:0000623"}}}
    with pytest.raises(
        InputError, match=r"labels, cell_type: no cell has the label 'NK'; labels there: 'B', 'T'"
    ):
        open_folder(two, obs_map=yaml_map(tmp_path, labels))
    with pytest.raises(
        InputError, match=r"names the file c\.h5ad, which is not in the folder; it holds: a\.h5ad"
    ):
        open_folder(two, obs_map=yaml_map(tmp_path, {"files": {"c.h5ad": {"matrix": "X"}}}))


def test_labels_that_the_map_does_not_name_are_counted(two: Path, tmp_path: Path) -> None:
    path = yaml_map(tmp_path, {"labels": {"cell_type": {"T": "CL:0000084"}}})
    folder = open_folder(two, obs_map=path)
    assert folder.remarks["labels_unmapped"] == {"cell_type": {"B": 25}}
    assert open_folder(two, obs_map=path, filter='cell_type == "T"').remarks["labels_unmapped"] == {}


def test_the_release_pins_the_content(two: Path, tmp_path: Path) -> None:
    symbols = symbols_table(tmp_path, {"x": IDS[0]})
    path = yaml_map(tmp_path, {"constants": {"sex": "unknown"}})
    release = open_folder(two, symbols=symbols, obs_map=path).release
    assert json.loads(json.dumps(release)) == release
    assert list(release["files"]) == ["a.h5ad", "b.h5ad"]
    assert open_folder(two, symbols=symbols, obs_map=path).release == release
    plain = open_folder(two).release
    assert (plain["obs_map"], plain["symbols"], plain["filter"]) == (None, None, "")
    with h5py.File(two / "b.h5ad", "r+") as file:
        file["X/data"][0] += 1
    changed = open_folder(two).release
    assert changed["files"]["a.h5ad"] == plain["files"]["a.h5ad"]
    assert changed["files"]["b.h5ad"] != plain["files"]["b.h5ad"]


def test_files_with_the_same_genes_share_a_layout(tmp_path: Path) -> None:
    for i in range(50):
        write(tmp_path / "f", f"{i:02d}.h5ad", counts_of(3, 60, i), IDS)
    reader = open_folder(tmp_path / "f").reader
    assert len(reader.layouts) == 1
    assert len(pickle.dumps(reader)) < 10_000


@pytest.fixture(scope="module")
def three(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> H5adFolder:
    """Three real studies as one corpus, with the obs map beside this test."""
    folder = tmp_path_factory.mktemp("three")
    for name in THREE:
        (folder / name).symlink_to(shared / name)
    return H5adFolder.open(
        CensusOptions(
            uri=str(folder),
            obs_map=str(Path(__file__).parent / "data" / "three_studies.yaml"),
            symbols=str(shared / "geneformer" / "gene_name_id_dict.pkl"),
        )
    )


def test_three_real_studies(three: H5adFolder, shared: Path) -> None:
    """Counts through the slices are anndata's, put on the union of genes by a matrix product."""
    id_of = read_pickle_dict(str(shared / "geneformer" / "gene_name_id_dict.pkl"))
    obs = three.obs(["dataset_id"])
    feature_id = three.var()["feature_id"].to_pylist()
    assert feature_id == sorted(set(feature_id))
    slices = make_slices(obs, 1_500_000)
    assert len(slices) > 3
    assert pa.concat_tables([part.cells for part in slices])["soma_joinid"].equals(obs["soma_joinid"])
    assert obs["soma_joinid"].to_pylist() == list(range(sum(THREE.values())))
    raw = [three.reader(part) for part in slices]
    counts = sp.vstack([one.counts for one in raw], format="csr")
    totals = np.concatenate([one.totals for one in raw])
    start, mapped = 0, 0
    for name in sorted(THREE):
        data = ad.read_h5ad(shared / name)
        ids = [gene if gene.startswith("ENSG") else id_of.get(gene) for gene in data.var_names]
        assert three.remarks["genes_without_id"][name] == ids.count(None)
        kept = [i for i, gene in enumerate(ids) if gene is not None]
        place = np.searchsorted(feature_id, [ids[i] for i in kept])
        onto = sp.csr_matrix((np.ones(len(kept)), (kept, place)), (len(ids), len(feature_id)))
        stop = start + len(data)
        assert stop - start == THREE[name]
        difference = counts[start:stop] - data.X @ onto
        assert abs(difference).max() == 0
        np.testing.assert_array_equal(
            totals[start:stop], np.asarray(data.X.sum(axis=1, dtype=np.float64)).ravel()
        )
        np.testing.assert_array_equal(obs["nnz"].to_numpy()[start:stop], np.diff(data.X.indptr))
        start, mapped = stop, mapped + len(kept)
    assert start == len(obs) == counts.shape[0]
    assert mapped > len(feature_id)  # they share genes
    assert len(pickle.dumps(three.reader)) < 5 * sum(len(layout) for layout in three.reader.layouts)


def test_every_label_of_the_three_studies_is_mapped_to_a_fitting_term(three: H5adFolder) -> None:
    columns = [name for facet in FACETS for name in (facet, f"{facet}_ontology_term_id")]
    obs = three.obs([*columns, "dataset_id"])
    assert three.remarks["labels_unmapped"] == {}
    assert len(obs["dataset_id"].combine_chunks().dictionary) == 7
    rows = obs.select(columns).to_pandas().drop_duplicates().to_dict("records")
    parser, ontology = OntologyParser(), Ontology.packaged()
    known = 0
    for row in rows:
        facets = {facet: (row[facet], row[f"{facet}_ontology_term_id"]) for facet in FACETS}
        for facet, (_, term) in facets.items():
            if term != "unknown":
                assert not parser.is_term_deprecated(term)
                known += 1
            value = next(v for v in describe(facets, ontology, TextOptions()).values if v.facet == facet)
            assert value.outcome == ("unknown" if term == "unknown" else "defined")
            assert value.id == ("" if term == "unknown" else term)
    assert known > 300
    assert {row["cell_type"] for row in rows if row["cell_type_ontology_term_id"] == "unknown"} == {"unknown"}
    names = {row["cell_type"]: row["cell_type_ontology_term_id"] for row in rows}
    labels = {name: parser.get_term_label(term) for name, term in names.items() if term != "unknown"}
    assert labels["gamma"] == "pancreatic PP cell"
    assert labels["CD16 Mono"] == "CD14-low, CD16-positive monocyte"
    assert labels["CD4+/CD45RA+/CD25- Naive T"] == "naive thymus-derived CD4-positive, alpha-beta T cell"
    assert labels["OPC"] == "oligodendrocyte precursor cell"
    assert labels["quiescent_stellate"] == "pancreatic stellate cell"
    assert labels["Eryth"] == "erythroid lineage cell"


def test_a_mouse_file_needs_no_map(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "mouse_val.h5ad").symlink_to(shared / "mouse_val.h5ad")
    options = CensusOptions(uri=str(tmp_path), organism="mus_musculus")
    folder = H5adFolder.open(options)
    data = ad.read_h5ad(shared / "mouse_val.h5ad")
    obs = folder.obs(["cell_type", "cell_type_ontology_term_id", "donor_id", "tissue_general"])
    assert obs["cell_type"].to_pylist() == data.obs["cell_type"].tolist()
    assert obs["cell_type_ontology_term_id"].to_pylist() == data.obs["cell_type_ontology_term_id"].tolist()
    assert obs["donor_id"].to_pylist() == ["C57BL6J-1"] * 1_000
    assert obs["tissue_general"].to_pylist() == ["unknown"] * 1_000
    order = np.argsort(data.var["ensembl_id"].to_numpy())
    assert folder.var()["feature_id"].to_pylist() == data.var["ensembl_id"].iloc[order].tolist()
    assert folder.var()["feature_name"].to_pylist() == data.var["feature_name"].iloc[order].tolist()
    raw = read_all(folder, max_nnz=9_000)
    np.testing.assert_array_equal(raw.counts.toarray(), data.X[:, order].toarray())
    assert not H5adFolder.open(CensusOptions(uri=str(tmp_path), organism="mus_musculus", filter="")).remarks[
        "labels_unmapped"
    ]
    with pytest.raises(InputError, match=r"mouse_val\.h5ad: gene ENSMUSG\d+ is not of homo_sapiens"):
        H5adFolder.open(CensusOptions(uri=str(tmp_path)))
