"""One part of the objective at a time, over seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from langcell.config import AblationConfig, parse_tree
from langcell.errors import InputError
from langcell.inference.tables import METHODS, TABLES
from langcell.objective.options import ObjectiveOptions
from langcell.recipes import ablation
from langcell.recipes.ablation import markdown, vary
from tests.small_text import small_text

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def test_a_variant_differs_from_the_run_in_one_thing() -> None:
    demo = ObjectiveOptions(mgm_view="shared", w_cc=0.1, ctm_cells=1)
    assert vary(demo, "all") == demo
    assert vary(demo, "no_cc") == replace(demo, w_cc=0.0)
    assert vary(demo, "no_ctm") == replace(demo, w_ctm=0.0)
    assert vary(demo, "paper") == replace(demo, preset="paper")
    assert vary(demo, "mgm_view") == replace(demo, mgm_view="own")
    assert vary(replace(demo, mgm_view="own"), "mgm_view") == demo
    assert vary(demo, "ctm_mining") == replace(demo, ctm_mining="balanced")
    for unknown in ("no_loss", "w_cc", ""):
        with pytest.raises(InputError, match=r"ablation\.variants: .* is not known; all, no_mgm"):
            vary(demo, unknown)


def _measured(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {method: {"balanced_accuracy": {"mean": mean, "by_seed": values}} for method in METHODS}


def test_the_table_shows_mean_and_range_and_leaves_out_what_a_variant_lacks() -> None:
    whole = {name: _measured([0.25, 0.75]) for name in TABLES}
    part = {name: _measured([0.5, 0.5]) for name in TABLES if name != "unseen"}
    text = markdown({"variants": {"all": {"zero_shot": whole}, "no_cc": {"zero_shot": part}}})
    lines = text.splitlines()
    assert "`seen` ct" in lines[0]
    assert "`unseen` ct" not in lines[0]
    assert lines[2].startswith("| all | 0.50 (0.25-0.75) | 0.50 (0.25-0.75) |")
    assert lines[3].startswith("| no_cc | 0.50 (0.50-0.50) |")


@pytest.mark.slow
def test_a_sweep_trains_every_variant_once(ray_session: None, tmp_path: Path) -> None:
    argv = [
        *("--model.text_init", str(small_text(tmp_path / "text"))),
        *("--run.dir", f"{tmp_path}/sweep", "--corpus.dir", f"{tmp_path}/corpus"),
        *("--census.dir", f"{tmp_path}/census", "--run.seeds", "1", "--ablation.variants", "[no_ctm]"),
        *("--train.stage1_epochs", "1", "--train.stage2_epochs", "1", "--train.num_workers", "1"),
        *("--model.cell_layers", "1", "--model.cell_width", "32", "--objective.ctm_cells", "1"),
        *("--eval.top_k", "1", "--eval.max_cells", "20"),
    ]
    config, _ = parse_tree(AblationConfig, "", DEMO, argv)
    result = ablation.run(config)
    assert json.loads((tmp_path / "sweep" / "summary.json").read_text()) == result
    stored = json.loads((tmp_path / "sweep" / "no_ctm" / "seed-0" / "summary.json").read_text())
    seen = result["variants"]["no_ctm"]["zero_shot"]["seen"]["ct"]["accuracy"]
    assert seen["by_seed"] == [stored["zero_shot"]["seen"]["ct"]["accuracy"]]
    assert "w_ctm: 0.0" in (tmp_path / "sweep" / "no_ctm" / "seed-0" / "config.yaml").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/seed-0/metrics.jsonl")}
    assert len(before) == 1
    assert ablation.run(config) == result
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "trained again"
