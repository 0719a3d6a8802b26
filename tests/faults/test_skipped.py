"""Updates that must not be made, in a whole run: left out, written down, and in the end it stops."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from langcell.errors import RunError
from langcell.recipes.training import fit
from langcell.storage import open_root
from langcell.train import metrics
from tests.faults.making import Tiny


@pytest.mark.slow
def test_a_run_whose_every_step_is_skipped_ends(ray_session: None, tiny: Tiny, tmp_path: Path) -> None:
    """Once, without a restart: the same cells would do the same again."""
    first, _ = tiny.tasks(tmp_path, skip_grad_norm=1e-6, max_skipped=5, checkpoint_steps=2)
    with pytest.raises(
        RunError, match=r"stage 1: 5 steps in a row up to step 4 .*train.skip_grad_norm \(1e-06\)"
    ):
        fit(first)
    rows = metrics.read(open_root(str(tmp_path)), metrics.METRICS)
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4, 5]
    assert not tiny.recoveries(tmp_path)
    joinids = {
        step: {
            j
            for path in tmp_path.glob(f"skipped/step-{step:08d}-*")
            for j in pq.read_table(path)[1].to_pylist()
        }
        for step in range(5)
    }
    assert all(len(cells) == 16 for cells in joinids.values())
    assert len(set().union(*joinids.values())) == 5 * 16
    # Resumed, it counts on from its checkpoint, and ends at once.
    with pytest.raises(RunError, match="5 steps in a row up to step 4"):
        fit(first)
    assert tiny.recoveries(tmp_path)[0]["step"] == 4
