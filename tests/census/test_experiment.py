"""A slice of a Census is what a plain tiledbsoma read gives."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path

import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma

from langcell.census.datasource import SliceSource
from langcell.census.experiment import Census, _runs
from langcell.census.layout import categorical, make_var, write_census
from langcell.census.options import CensusOptions
from langcell.census.reading import counts_block, counts_bytes, counts_of
from langcell.census.slices import BAND, make_slices
from langcell.errors import InputError


@pytest.fixture(scope="module")
def options(demo_uri: str) -> CensusOptions:
    return CensusOptions(uri=demo_uri)


@pytest.fixture(scope="module")
def banded(tmp_path_factory: pytest.TempPathFactory) -> tuple[CensusOptions, sp.csr_matrix]:
    """A Census of 9,000 cells and 2,500 genes: five bands of rows, two of columns."""
    rng = np.random.default_rng(0)
    counts = sp.random(9_000, 2_500, 0.004, format="csr", dtype=np.float32, random_state=rng)
    counts.data = rng.integers(1, 50, counts.nnz).astype(np.float32)
    n = counts.shape[0]
    obs = pa.table(
        {
            "soma_joinid": np.arange(n),
            "cell_type": categorical([f"type {i // 1_000}" for i in range(n)]),
            "is_primary_data": pa.array((np.arange(n) % 3 != 0) & ~((np.arange(n) // BAND) == 1)),
            "raw_sum": np.asarray(counts.sum(axis=1), np.float64).ravel() + 1,
            "nnz": np.diff(counts.indptr).astype(np.int64),
        }
    )
    path = str(tmp_path_factory.mktemp("banded") / "census")
    genes = [f"G{i}" for i in range(2_500)]
    write_census(path, [counts], obs, make_var(genes, genes))
    return CensusOptions(uri=path), counts


@pytest.mark.parametrize("max_nnz", [400, 9_000, 10**9])
def test_slices_read_what_a_plain_read_gives(
    banded: tuple[CensusOptions, sp.csr_matrix], max_nnz: int
) -> None:
    options, counts = banded
    with Census.open(options) as census:
        cells = census.obs(["cell_type"])
        slices = make_slices(cells, max_nnz)
        if max_nnz == 400:  # 400 per slice are 500 slices; a few say as much
            slices = slices[::60]
        joinid = np.concatenate([s.cells["soma_joinid"].to_numpy() for s in slices])
        raw = [census.reader(s) for s in slices]
    assert all(cells.fits.all() for cells in raw)
    matrices = [cells.counts for cells in raw]
    for matrix in matrices:
        assert matrix.dtype == np.float32
        assert matrix.has_sorted_indices
    got = sp.vstack(matrices, format="csr")
    assert (got != counts[joinid]).nnz == 0
    with cellxgene_census.open_soma(uri=options.uri) as plain:
        human = plain["census_data"]["homo_sapiens"]
        table = human.ms["RNA"].X["raw"].read((joinid,)).tables().concat()
    order = {j: i for i, j in enumerate(joinid.tolist())}
    expected = sp.coo_matrix(
        (
            table["soma_data"].to_numpy(),
            ([order[j] for j in table["soma_dim_0"].to_pylist()], table["soma_dim_1"].to_numpy()),
        ),
        shape=got.shape,
    ).tocsr()
    assert (got != expected).nnz == 0


def test_bands_without_a_wanted_cell_are_not_read(banded: tuple[CensusOptions, sp.csr_matrix]) -> None:
    with Census.open(banded[0]) as census:  # its filter leaves out all of band 1
        (only,) = make_slices(census.obs([]), 10**9)
    assert _runs(only.cells["soma_joinid"].to_numpy(), only.start, only.stop) == [
        (1, BAND),
        (2 * BAND, only.stop),
    ]


def test_a_cell_that_obs_and_x_tell_differently_does_not_fit(options: CensusOptions) -> None:
    with Census.open(options) as census:
        (whole,) = make_slices(census.obs([]), 10**9)
        right = census.reader(whole)
        assert right.fits.all()
        nnz = whole.cells["nnz"].to_numpy()
        for off in (-1, 1):
            promised = nnz + off * (np.arange(700) == 123)
            cells = whole.cells.set_column(2, "nnz", pa.array(promised))
            raw = census.reader(dataclasses.replace(whole, cells=cells))
            assert np.flatnonzero(~raw.fits).tolist() == [123]
            others = np.arange(700) != 123
            assert (raw.counts[others] != right.counts[others]).nnz == 0


def test_obs_or_var_beyond_x_are_refused(tmp_path: Path) -> None:
    counts = sp.csr_matrix(np.ones((3, 2), np.float32))
    obs = pa.table({"soma_joinid": np.arange(3), "is_primary_data": [True] * 3})
    write_census(str(tmp_path / "census"), [counts], obs, make_var(["A", "B"], ["A", "B"]))
    human = f"{tmp_path}/census/census_data/homo_sapiens"
    frame = human + "/obs"
    with tiledbsoma.open(frame) as reader:
        rows = reader.read().concat()
    with tiledbsoma.open(frame, "w") as writer:
        writer.tiledbsoma_resize_soma_joinid_shape(4)
    with tiledbsoma.open(frame, "w") as writer:
        writer.write(rows.slice(0, 1).set_column(0, "soma_joinid", pa.array([3])))
    says = r"obs of .* does not fit X: it has the cell 3, .* ends at 2"
    with (
        Census.open(CensusOptions(uri=f"{tmp_path}/census")) as census,
        pytest.raises(InputError, match=says),
    ):
        census.obs([])


def test_obs_is_filtered_ordered_and_typed(options: CensusOptions) -> None:
    chosen = dataclasses.replace(options, filter='cell_type in ["B cell", "natural killer cell"]')
    with Census.open(chosen) as census:
        obs = census.obs(["cell_type", "nnz", "observation_joinid"])
    assert obs.column_names == ["soma_joinid", "raw_sum", "nnz", "cell_type", "observation_joinid"]
    assert len(obs) == 95 + 31
    assert set(obs["cell_type"].to_pylist()) == {"B cell", "natural killer cell"}
    assert obs.schema.field("cell_type").type == pa.dictionary(pa.int32(), pa.string())
    assert obs.schema.field("raw_sum").type == pa.float64()
    assert (np.diff(obs["soma_joinid"]) > 0).all()


def test_no_filter_is_every_cell(options: CensusOptions) -> None:
    with Census.open(dataclasses.replace(options, filter="")) as census:
        assert len(census.obs([])) == 700


def test_var_is_in_column_order(options: CensusOptions) -> None:
    with Census.open(options) as census:
        var = census.var()
    assert var["soma_joinid"].to_pylist() == list(range(765))
    assert var["feature_name"][:3].to_pylist() == ["HES4", "TNFRSF4", "SSU72"]
    assert var.schema.field("feature_id").type == pa.string()


def test_demo_opens_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Census.open(CensusOptions(uri="demo", dir="here")) as census:
        cells, reader = census.obs([]), census.reader
        assert census.release == {
            "uri": "demo",
            "organism": "homo_sapiens",
            "filter": "is_primary_data == True",
            "schema": "2.4.0",
            "build": "demo",
        }
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a task's folder is not the driver's
    (whole,) = make_slices(cells, 10**9)
    assert reader(whole).counts.shape == (700, 765)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_release_is_opened_by_version_and_pinned(
    demo_uri: str, options: CensusOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two look-ups that need a network; everything behind them is cellxgene_census's own.
    mirror = {"provider": "S3", "base_uri": f"file://{os.path.dirname(demo_uri)}/", "region": "us-west-2"}
    where = {"soma": {"uri": "", "relative_uri": os.path.basename(demo_uri), "s3_region": "us-west-2"}}
    asked = []
    monkeypatch.setattr(
        cellxgene_census._open, "_get_census_mirrors", lambda: {"default": "here", "here": mirror}
    )
    monkeypatch.setattr(
        cellxgene_census._open,
        "get_census_version_description",
        lambda version: asked.append(version) or {**where, "release_build": "2025-11-08"},
    )
    with Census.open(CensusOptions(version="stable")) as census:
        assert asked == ["stable"]
        assert census.release["version"] == "demo"  # the build date that the Census itself states
        assert "uri" not in census.release
        (whole,) = make_slices(census.obs([]), 10**9)
        got = census.reader(whole).counts
    assert asked == ["stable"]  # a task opens the URI that the driver resolved
    with Census.open(options) as plain:
        assert (got != plain.reader(whole).counts).nnz == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uri": "/no/such/folder"}, r"census\.uri /no/such/folder.*demo"),
        ({"uri": os.path.dirname(__file__)}, r"census\.uri .*no SOMA collection"),
        ({"organism": "mus_musculus"}, r"census\.organism 'mus_musculus'.*homo_sapiens"),
        ({"filter": "cell_type =="}, r"census\.filter .*value filter"),
        ({"filter": "no_such == 1"}, r"census\.filter .*no_such"),
        ({"filter": "raw_sum == 'many'"}, r"census\.filter "),
        ({"filter": "cell_type == 'b cell'"}, r"census\.filter .*matches no cell"),
    ],
)
def test_wrong_options_are_named(options: CensusOptions, change: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Census.open(dataclasses.replace(options, **change))


def test_a_part_of_a_census_is_not_one(options: CensusOptions) -> None:
    with pytest.raises(InputError, match=r"not a Census.*census_info"):
        Census.open(dataclasses.replace(options, uri=f"{options.uri}/census_data"))


def test_an_unreachable_release_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(cellxgene_census, "open_soma", refuse)
    with pytest.raises(InputError, match=r"census\.version '2025-11-08'.*name resolution.*census\.uri"):
        Census.open(CensusOptions())


def test_a_missing_column_is_named(options: CensusOptions) -> None:
    with Census.open(options) as census, pytest.raises(InputError, match=r"no column phase.*tissue_general"):
        census.obs(["cell_type", "phase"])


def test_cells_are_named_with_their_dataset(options: CensusOptions) -> None:
    with Census.open(options) as census:
        assert census.datasets(np.array([3, 699])) == ["10x_pbmc68k_reduced"] * 2


def test_blocks_of_ray_data_hold_the_same_cells(ray_session: None, options: CensusOptions) -> None:
    import ray

    with Census.open(options) as census:
        cells, reader = census.obs(["cell_type_ontology_term_id"]), census.reader
        slices = make_slices(cells, 30_000)
        assert len(slices) > 3
        source = SliceSource(partial(counts_block, reader, 1), slices, counts_bytes)
        expected = sp.vstack([reader(s).counts for s in slices], format="csr")
    tasks = source.get_read_tasks(parallelism=1)
    assert [t.metadata.num_rows for t in tasks] == [len(s.cells) for s in slices]
    (block,) = tasks[0]()
    assert block.nbytes == pytest.approx(tasks[0].metadata.size_bytes, rel=0.02)
    assert sum(t.metadata.size_bytes for t in tasks) == source.estimate_inmemory_data_size()

    blocks = [ray.get(ref) for ref in ray.data.read_datasource(source).to_arrow_refs()]
    table = pa.concat_tables(blocks).sort_by("soma_joinid")
    added = ["slice", "fault", "reason", "gene", "count"]
    assert table.drop_columns(added).to_pylist() == cells.to_pylist()
    assert set(table["fault"].to_pylist()) == {0}
    assert (counts_of(table, 765) != expected).nnz == 0
    part = table.slice(100, 50)  # rows of a block keep its offsets
    assert (counts_of(part, 765) != expected[100:150]).nnz == 0
    by_slice = {i: len(s.cells) for i, s in enumerate(slices)}
    assert dict(zip(*np.unique(table["slice"], return_counts=True), strict=True)) == by_slice
