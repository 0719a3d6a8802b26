"""The main job, end to end on the embedded cells: small, but no stage left out."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import yaml

from langcell.census.demo import demo_adata
from langcell.config import parse
from langcell.errors import InputError
from langcell.inference.tables import MEASURES, TABLES
from langcell.model.interop import load_export
from langcell.recipes.pretrain import run
from langcell.recipes.rundir import check_free, place_in, run_name, take, with_absolute_paths
from langcell.storage import open_root
from langcell.train import metrics

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def _argv(folder: Path) -> list[str]:
    return [
        *(
            "--run.dir",
            f"{folder}/run",
            "--corpus.dir",
            f"{folder}/corpus",
            "--census.dir",
            f"{folder}/census",
        ),
        *("--train.stage1_epochs", "1", "--train.stage2_epochs", "2", "--train.evaluate_epochs", "1"),
        *("--model.cell_layers", "1", "--objective.ctm_cells", "1", "--eval.top_k", "2"),
        *("--train.micro_batch", "4", "--train.profile", "1"),  # two lanes a worker
    ]


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run directory and summary of one short run."""
    folder = tmp_path_factory.mktemp("pretrain")
    return folder / "run", run(parse("", DEMO, _argv(folder)))


@pytest.mark.slow
def test_summary_has_every_promised_figure(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    assert json.loads((directory / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["rows_repeated"] == summary["rows_skipped"] == summary["steps_replayed"] == 0
    for key in ("cells_per_s", "tokens_per_s"):
        assert summary[key] > 0
    assert 0 <= summary["data_wait"] < 1
    assert summary["losses"].keys() == {"mgm", "cc", "ct", "ctm"}
    assert all(math.isfinite(loss) for loss in summary["losses"].values())
    for name in TABLES:
        for method in ("ct", "two_step"):
            figures = summary["zero_shot"][name][method]
            assert figures["n"] > 0
            assert all(0 <= figures[measure] <= 1 for measure in MEASURES)
    assert summary["zero_shot"]["seen"]["ct"]["baseline"]["accuracy"] > 0.8


@pytest.mark.slow
def test_every_step_stands_once_in_the_record(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    rows = metrics.read(open_root(str(directory)), metrics.METRICS)
    assert [row["step"] for row in rows] == list(range(summary["steps"]))
    assert [row["stage"] for row in rows] == sorted(row["stage"] for row in rows)
    first, last = rows[0], rows[-1]
    assert {"mgm", "cc"} <= first.keys()
    assert not {"ct", "ctm"} & first.keys()
    assert {"mgm", "cc", "ct", "ctm", "val_ct", "lr", "grad_norm", "data_wait"} <= last.keys()
    assert last["mfu"] is None  # on a CPU
    assert last["ctm_empty"] >= 0


@pytest.mark.slow
def test_a_step_of_each_stage_is_traced(finished: tuple[Path, dict[str, Any]]) -> None:
    for stage in (1, 2):
        with gzip.open(finished[0] / "profile" / f"stage{stage}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert "aten::addmm" in names
        assert "aten::" in (finished[0] / "profile" / f"stage{stage}.txt").read_text()


@pytest.mark.slow
def test_training_moved_the_losses(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = metrics.read(open_root(str(finished[0])), metrics.METRICS)
    assert rows[-1]["mgm"] < rows[0]["mgm"] - 0.05


@pytest.mark.slow
def test_the_export_is_whole_and_the_report_stands_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = finished
    model, config = load_export(directory / "export")
    assert not model.training
    assert config["tau"] == pytest.approx(0.2)
    names = {path.name for path in (directory / "export").iterdir()}
    assert {"vocabulary.json", "beta.parquet", "README.md", "tokenizer.json"} <= names
    report = (directory / "report" / "index.html").read_text()
    assert "data:image/png;base64" in report
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    assert stored["train"]["stage2_epochs"] == 2


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_result(finished: tuple[Path, dict[str, Any]]) -> None:
    """`--run.resume` of a whole run trains no step again and gives the same tables."""
    directory, summary = finished
    before = (directory / "metrics.jsonl").read_bytes()
    again = run(parse("", DEMO, [*_argv(directory.parent), "--run.resume", "true"]))
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert again["zero_shot"] == summary["zero_shot"]


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    place = ["--run.dir", str(tmp_path / "run")]
    config = with_absolute_paths(parse("", DEMO, place))
    assert not check_free(config)
    assert take(config) != take(config), "each job has a name of its own"
    with pytest.raises(InputError, match="holds a run already"):
        check_free(config)
    resumed = with_absolute_paths(parse("", DEMO, [*place, "--run.resume", "true"]))
    assert check_free(resumed)
    again = with_absolute_paths(parse("", DEMO, [*place, "--run.resume", "auto"]))
    assert check_free(again)
    other = with_absolute_paths(parse("", DEMO, [*place, "--run.resume", "true", "--train.lr", "0.5"]))
    with pytest.raises(InputError, match=r"train\.lr: 0\.001 there, 0\.5 asked for"):
        check_free(other)
    absent = parse("", DEMO, ["--run.dir", str(tmp_path / "other"), "--run.resume", "true"])
    with pytest.raises(InputError, match="no run to go on with"):
        check_free(absent)
    assert not check_free(parse("", DEMO, ["--run.dir", str(tmp_path / "other"), "--run.resume", "auto"]))
    again = parse("", DEMO, ["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == config


def test_a_run_is_resumed_with_other_means_of_reading(tmp_path: Path) -> None:
    place = ["--run.dir", str(tmp_path / "run")]
    take(with_absolute_paths(parse("", DEMO, place)))
    means = ["--census.attempts=10", "--census.bad_cells=skip", f"--census.dir={tmp_path}"]
    means += ['--census.tiledb={"vfs.s3.region": "eu-west-1"}', "--corpus.prefetch=9", "--eval.top_k=2"]
    # And with other workers: the order of cells, the draws and the checkpoints know nothing of them.
    means += ["--train.num_workers=1", "--train.zero=3", "--train.checkpoint_steps=7", "--train.offload=true"]
    check_free(with_absolute_paths(parse("", DEMO, [*place, "--run.resume=true", *means])))
    other = [*place, "--run.resume=true", "--census.filter=sex == 'female'"]
    with pytest.raises(InputError, match=r"census\.filter: "):
        check_free(with_absolute_paths(parse("", DEMO, other)))


def test_relative_paths_reach_workers_as_absolute_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    paths = ["--model.cell_init", "weights", "--model.text_init", "some/hub-id", "--run.dir", "r"]
    config = with_absolute_paths(parse("", DEMO, paths))
    assert config.model.cell_init == str(tmp_path / "weights")
    assert config.model.text_init == "some/hub-id"
    assert config.run.dir == str(tmp_path / "r")
    remote = with_absolute_paths(parse("", DEMO, ["--run.dir", "s3://bucket/runs/one?region=eu-west-1"]))
    assert run_name(remote) == "one"
    assert place_in(remote, "summary.json") == "s3://bucket/runs/one/summary.json?region=eu-west-1"
    with pytest.raises(InputError, match="must hold no credentials"):
        parse("", DEMO, ["--run.dir", "s3://key:secret@bucket/run"])


def test_a_stored_configuration_means_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "run.dir": "r",
        "corpus.dir": "c",
        "census.uri": "files",
        "census.obs_map": "map.yaml",
        "census.symbols": "symbols.tsv",
        "census.dir": "mini",
        "beta.source": "medians.pkl",
        "tokens.vocabulary": "vocabulary.json",
    }
    config = with_absolute_paths(parse("", DEMO, [f"--{name}={path}" for name, path in places.items()]))
    for name, path in places.items():
        room, key = name.split(".")
        assert getattr(getattr(config, room), key) == str(tmp_path / path)
    take(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert with_absolute_paths(parse("", DEMO, ["--config", str(tmp_path / "r" / "config.yaml")])) == config
    uris = ["--beta.source=s3://bucket/medians.parquet", "--census.uri=s3://bucket/census"]
    remote = with_absolute_paths(parse("", DEMO, uris))
    assert (remote.beta.source, remote.census.uri) == ("s3://bucket/medians.parquet", "s3://bucket/census")
    assert with_absolute_paths(parse("", DEMO, [])).census.uri == "demo"


@pytest.mark.slow
def test_the_readme_goes_from_counts_to_a_labelled_umap(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The lines of README.md as they stand, on real cells: FACS-sorted blood where it is at hand, else the
    demo's."""
    readme = (DEMO.parents[2] / "README.md").read_text()
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "sc.pl.umap" in block)
    sorted_cells = DEMO.parents[3] / "shared" / "data" / "zheng_facs_pbmc_counts.h5ad"
    cells = (
        anndata.read_h5ad(sorted_cells)[::20].copy() if sorted_cells.exists() else demo_adata()[::3].copy()
    )
    cells.write_h5ad(tmp_path / "pbmc.h5ad")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "export").symlink_to(finished[0] / "export")
    saved = f"{lines}\nadata.write_h5ad('labelled.h5ad')"
    done = subprocess.run([sys.executable, "-c", saved], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = anndata.read_h5ad(tmp_path / "labelled.h5ad")
    assert found.n_obs == cells.n_obs
    assert set(found.obs["langcell_label"]) <= set(found.uns["langcell"]["candidates"])
    z = found.obsm["X_langcell"]  # three epochs place cells apart, if not yet under their names
    assert np.ptp(z, axis=0).max() > 1e-3
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert "X_umap" in found.obsm
    assert (tmp_path / "figures" / "umap_pbmc.png").read_bytes()[:4] == b"\x89PNG"
