"""What is written is what was given, in however many blocks, and what X tells is measured from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma as soma
from pandas.testing import assert_frame_equal

from langcell.census.layout import ORGANISM, categorical, make_var, write_census

N_CELLS, N_GENES = 5_000, 2_100  # three bands of rows, two of columns


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    counts = sp.random(N_CELLS, N_GENES, 0.004, format="csr", dtype=np.float32, random_state=rng)
    counts.data = rng.integers(1, 50, counts.nnz).astype(np.float32)
    counts.data[counts.indptr[7] : counts.indptr[8]] = 0
    counts.eliminate_zeros()
    return counts


def obs_of(n: int) -> pa.Table:
    types = categorical([f"type {i % 300}" for i in range(n)])
    return pa.table(
        {"soma_joinid": np.arange(n), "cell_type": types, "is_primary_data": np.arange(n) % 2 == 0}
    )


def written(path: Path, blocks: list[sp.csr_matrix], obs: pa.Table) -> dict[str, pa.Table]:
    genes = [f"G{i}" for i in range(N_GENES)]
    write_census(str(path), blocks, obs, make_var(genes, genes))
    with soma.open(str(path)) as census:
        experiment = census["census_data"][ORGANISM]
        rna = experiment.ms["RNA"]
        x = rna.X["raw"].read((slice(None), slice(None))).tables().concat()
        return {
            "x": x.sort_by([("soma_dim_0", "ascending"), ("soma_dim_1", "ascending")]),
            "obs": experiment.obs.read().concat().sort_by("soma_joinid"),
            "var": rna.var.read().concat().sort_by("soma_joinid"),
            "summary": census["census_info"]["summary"].read().concat(),
        }


def test_blocks_make_no_difference(counts: sp.csr_matrix, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", [counts], obs_of(N_CELLS))
    blocks = written(tmp_path / "blocks", [counts[:2048], counts[2048:2048], counts[2048:]], obs_of(N_CELLS))
    for name, table in whole.items():
        assert blocks[name].schema == table.schema
        assert_frame_equal(blocks[name].to_pandas(), table.to_pandas())
    coo = counts.tocoo()
    np.testing.assert_array_equal(whole["x"]["soma_dim_0"], coo.row)
    np.testing.assert_array_equal(whole["x"]["soma_dim_1"], coo.col)
    np.testing.assert_array_equal(whole["x"]["soma_data"], coo.data)


def test_what_x_tells_is_measured(counts: sp.csr_matrix, tmp_path: Path) -> None:
    read = written(tmp_path / "census", [counts[:3000], counts[3000:]], obs_of(N_CELLS))
    obs, dense = read["obs"].to_pandas(), counts.toarray().astype(np.float64)
    assert obs.columns[-5:].tolist() == [
        "raw_sum",
        "nnz",
        "raw_mean_nnz",
        "raw_variance_nnz",
        "n_measured_vars",
    ]
    np.testing.assert_array_equal(obs["raw_sum"], dense.sum(axis=1))
    np.testing.assert_array_equal(obs["nnz"], (dense > 0).sum(axis=1))
    non_zero = np.where(dense == 0, np.nan, dense)
    several = obs["nnz"] > 1
    assert several.sum() > 4_000
    np.testing.assert_allclose(obs["raw_mean_nnz"][several], np.nanmean(non_zero[several], axis=1))
    np.testing.assert_allclose(obs["raw_variance_nnz"][several], np.nanvar(non_zero[several], axis=1, ddof=1))
    assert obs["raw_sum"][7] == 0
    var = read["var"].to_pandas()
    np.testing.assert_array_equal(var["nnz"], (dense > 0).sum(axis=0))
    assert (var["n_measured_obs"] == N_CELLS).all()
    about = dict(zip(read["summary"]["label"].to_pylist(), read["summary"]["value"].to_pylist(), strict=True))
    assert about["total_cell_count"] == "5000"
    assert about["unique_cell_count"] == "2500"


def test_what_obs_says_itself_stays(counts: sp.csr_matrix, tmp_path: Path) -> None:
    wrong = obs_of(N_CELLS).append_column("nnz", pa.array(np.full(N_CELLS, 3, np.int64)))
    assert set(written(tmp_path / "census", [counts], wrong)["obs"]["nnz"].to_pylist()) == {3}


def test_blocks_must_hold_the_cells_of_obs(counts: sp.csr_matrix, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4000 cells, obs 5000"):
        written(tmp_path / "census", [counts[:4000]], obs_of(N_CELLS))


@pytest.mark.parametrize(("n", "index"), [(127, pa.int8()), (128, pa.int16()), (40_000, pa.int32())])
def test_categories_take_the_narrowest_index(n: int, index: pa.DataType) -> None:
    values = categorical([str(i) for i in range(n)])
    assert values.type == pa.dictionary(index, pa.large_string())
    assert values.to_pylist() == [str(i) for i in range(n)]
