"""A release whose obs tells neither lengths nor totals gives the corpus of one that does."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiledbsoma

from langcell.census.experiment import Census
from langcell.census.layout import write_frame
from langcell.census.options import CensusOptions
from langcell.corpus.measuring import measure
from tests.corpus.making import make, read_blocks
from tests.corpus.test_bad_cells import OPTIONS, write


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory) -> tuple[str, str]:
    """Two Censuses of the same cells; obs of the first ends before raw_sum, as before 2023-12-15."""
    folder = tmp_path_factory.mktemp("old")
    new, old = write(folder / "new", {}), write(folder / "old", {})
    human = f"{old}/census_data/homo_sapiens"
    with tiledbsoma.open(human + "/obs") as frame:
        obs = frame.read().concat()
    keep = [n for n in obs.column_names if n not in ("raw_sum", "nnz", "raw_mean_nnz", "raw_variance_nnz")]
    with tiledbsoma.open(human, "d") as experiment:
        del experiment["obs"]
    shutil.rmtree(human + "/obs")
    with tiledbsoma.open(human, "w") as experiment:
        write_frame(experiment, "obs", obs.select(keep).combine_chunks())
    return old, new


def test_lengths_and_totals_are_those_of_x(ray_session, old_and_new) -> None:
    old, new = old_and_new
    some = "is_primary_data == True and soma_joinid not in [3, 4, 200]"
    with Census.open(CensusOptions(uri=old, filter=some)) as census:
        bare = census.obs(["cell_type"])
        assert bare["nnz"].null_count == bare["raw_sum"].null_count == len(bare) == 297
        measured = measure(census.reader, 1, bare)
    with Census.open(CensusOptions(uri=new, filter=some)) as census:
        told = census.obs(["cell_type"])
    assert measured.column_names == told.column_names
    for name in ("soma_joinid", "nnz", "raw_sum"):
        np.testing.assert_array_equal(measured[name], told[name])


def test_the_corpus_is_the_same(ray_session, old_and_new, tmp_path) -> None:
    summaries = [make(uri, tmp_path / str(i), [], **OPTIONS) for i, uri in enumerate(old_and_new)]
    assert summaries[0].beta_hash == summaries[1].beta_hash
    assert read_blocks(tmp_path / "0") == read_blocks(tmp_path / "1")
