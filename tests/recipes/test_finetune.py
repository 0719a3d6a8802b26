"""jobs/finetune.py: targets and splits as stated, errors that say what to do, and that it learns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard

import langcell
from langcell.census.demo import demo_adata
from langcell.config import FinetuneConfig
from langcell.errors import InputError, RunError
from langcell.inference.embed import tokenize
from langcell.inference.options import AnnotateOptions
from langcell.inference.predict import FineTuned, predict
from langcell.inference.pretrained import Pretrained
from langcell.recipes.entry import RESUME
from langcell.recipes.finetune import run
from langcell.recipes.labelled import read_study
from langcell.recipes.labels import Labels, read_labels, split_cells
from langcell.recipes.options import FinetuneOptions, PlaceOptions
from langcell.train.fitting import fit_classifier
from langcell.train.options import FitOptions
from tests.jobs.head import ROOT, end

JOB = ROOT / "jobs" / "finetune.py"
OBS = pd.DataFrame(
    {
        "type": pd.Categorical(["b", "a", "b", "a", "c", "c", "b", "a", "c", "b"]),
        "one": ["x"] * 10,
        "rare": ["x"] * 9 + ["y"],
        "gap": ["x", "y", None] + ["x"] * 7,
        "age": np.arange(10.0) * 2,
        "age_gap": [1.0, np.nan, *range(8)],
        "flat": [3] * 10,
        "donor": [f"d{i // 2}" for i in range(10)],
        "split": ["train"] * 5 + ["val"] * 2 + ["test"] * 2 + ["else"],
        "p": [True, False] * 5,
        "q": [0, 0, 1, 1, 0, 1, 0, 1, 0, 1],
        "never": [0] * 10,
        "sets": ["p||q", "p", "", "q", "p || r", "q", "r", "p", "q||r", "p"],
        "words": list("abcdefghij"),
        "blank": ["x", " ", "y"] + ["x", "y"] * 3 + ["x"],
        "half": ["train"] * 5 + ["val"] * 3 + ["holdout"] * 2,
        "donor_gap": ["d0", "d1", "d2", "d3", "d0", "d1", "d2", "d3", None, None],
    },
    index=[f"cell{i}" for i in range(10)],
)


def split(labels: Labels, by: str | None = None, test: float = 0.2, val: float = 0.1, seed: int = 0) -> Any:
    return split_cells(labels, OBS, by, test_share=test, val_share=val, seed=seed, option="x.by")


def test_classes_numbers_and_several_labels_are_read() -> None:
    types = read_labels(OBS, ["type"], "classification")
    assert types.head.classes == ("a", "b", "c")
    assert types.value.tolist() == [1, 0, 1, 0, 2, 2, 1, 0, 2, 1]
    assert types.targets(np.array([4, 1])).tolist() == [2, 0]
    rows = np.array([0, 1, 2])
    age = read_labels(OBS, ["age"], "regression").standardised_by(rows)
    assert (age.head.mean, age.head.std) == (2.0, pytest.approx(np.std([0, 2, 4])))
    assert age.targets(rows).mean() == pytest.approx(0)
    assert age.targets(rows).std(correction=0) == pytest.approx(1)
    flags = read_labels(OBS, ["p", "q"], "multilabel")
    assert flags.head.classes == ("p", "q")
    assert flags.value[:3].tolist() == [[1, 0], [0, 0], [1, 1]]
    joined = read_labels(OBS, ["sets"], "multilabel")
    assert joined.head.classes == ("p", "q", "r")
    assert joined.value[[0, 2, 4]].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert joined.targets(rows).dtype == torch.float32


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        (["typo"], "classification", r"obs has no column 'typo'; it has: type, one"),
        (["one"], "classification", "every cell of obs\\['one'\\] is 'x'"),
        (["rare"], "classification", "classes of one cell.*: y. Take"),
        (["gap"], "classification", "1 of 10 cells have no value in obs\\['gap'\\] \\(first: cell2\\)"),
        (["blank"], "classification", "1 of 10 cells have no value in obs\\['blank'\\] \\(first: cell1\\)"),
        (["age_gap"], "regression", "1 of 10 cells have no value in obs\\['age_gap'\\] \\(first: cell1\\)"),
        (["words"], "regression", "holds no numbers"),
        (["p"], "regression", "true and false"),
        (["p", "q"], "classification", "2 columns; a classification takes one"),
        (["p", "age"], "multilabel", "obs\\['age'\\] must hold true and false"),
        (["p", "never"], "multilabel", "of all cells, or of none: never"),
        (["one"], "multilabel", "1 label in obs\\['one'\\]"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(columns: list[str], kind: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(OBS, columns, kind)


def test_a_flat_number_is_refused() -> None:
    with pytest.raises(InputError, match="is 3 for every training cell"):
        read_labels(OBS, ["flat"], "regression").standardised_by(np.arange(5))


def test_a_random_split_takes_the_same_share_of_each_class() -> None:
    value = np.repeat([0, 1, 2], [100, 40, 2])
    labels = replace(read_labels(OBS, ["type"], "classification"), value=value)
    found = split_cells(labels, OBS, None, test_share=0.2, val_share=0.1, seed=0, option="by")
    counts = {part: np.bincount(value[getattr(found, part)]).tolist() for part in ("train", "val", "test")}
    assert counts == {"train": [70, 28, 1], "val": [10, 4], "test": [20, 8, 1]}
    assert sorted(np.concatenate([found.train, found.val, found.test])) == list(range(142))
    assert found.rule == "20% of the cells of each class to test and 10% to validate, at random (seed 0)"
    other = split_cells(labels, OBS, None, test_share=0.2, val_share=0.1, seed=1, option="by")
    assert found.test.tolist() != other.test.tolist()


def test_groups_stay_together() -> None:
    labels = read_labels(OBS, ["age"], "regression")
    for seed in range(5):
        found = split(labels, "donor", test=0.3, seed=seed)
        donors = [set(OBS["donor"].iloc[rows]) for rows in (found.train, found.val, found.test)]
        assert [len(of) for of in donors] == [2, 1, 2]
        assert not donors[0] & donors[1]
        assert not donors[2] & (donors[0] | donors[1])
        assert "groups of obs['donor'] stay together" in found.rule
    assert len(split(labels, "donor", test=0.99).train) == 2, "a group is left to train"
    found = split(labels, "donor_gap")
    assert sorted(np.concatenate([found.train, found.val, found.test])) == list(range(8)), "no group, no part"
    assert found.left_out == {"obs['donor_gap'] names no part": 2}
    with pytest.raises(InputError, match="1 group; 3 at least are needed"):
        split(labels, "one")


def test_a_column_may_hold_the_split() -> None:
    labels = read_labels(OBS, ["type"], "classification")
    found = split(labels, "split")
    assert (found.train.tolist(), found.val.tolist(), found.test.tolist()) == (list(range(5)), [5, 6], [7, 8])
    assert found.left_out == {"obs['split'] names no part": 1}
    with pytest.raises(InputError, match=r"x\.by: obs\['half'\] holds 'holdout', 'train', 'val'; parts are"):
        split(labels, "half")
    with pytest.raises(InputError, match=r"x\.by: obs has no column 'no'"):
        split(labels, "no")


def test_the_parts_of_a_column_may_be_written_in_any_capitals() -> None:
    labels = read_labels(OBS, ["type"], "classification")
    words = {"train": "Train", "val": "Validation", "test": " TEST"}
    obs = OBS.assign(split=[words.get(part, part) for part in OBS["split"]])
    found = split_cells(labels, obs, "split", test_share=0.2, val_share=0.1, seed=0, option="x.by")
    assert (found.train.tolist(), found.val.tolist(), found.test.tolist()) == (list(range(5)), [5, 6], [7, 8])
    assert found.left_out == {"obs['split'] names no part": 1}


def test_classes_that_are_never_trained_are_left_out_and_counted() -> None:
    labels = read_labels(OBS, ["type"], "classification")
    found = replace(split(labels, "split"), train=np.array([0, 2, 4]))  # b, b, c
    learnt, kept = labels.learnt(found)
    assert learnt.head.classes == ("b", "c")
    assert (kept.val.tolist(), kept.test.tolist()) == ([5, 6], [8])
    assert kept.left_out == {"obs['split'] names no part": 1, "class of no training cell": 1}
    assert learnt.targets(np.array([0, 4, 6, 8])).tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"x\.by: every training cell is 'b'"):
        labels.learnt(replace(found, train=np.array([0, 2])))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's cells of four types, with numbers and labels made of their counts."""
    cells = demo_adata()
    often = cells.obs["cell_type"].value_counts().index[:4]
    cells = cells[cells.obs["cell_type"].isin(often)][:240].copy()
    total = np.asarray(cells.X.sum(1)).ravel()
    cells.obs["total"] = total
    cells.obs["large"] = total > np.median(total)
    cells.obs["has_first"] = np.asarray(cells.X[:, 0].todense()).ravel() > 0
    cells.obs["donor"] = [f"d{i % 6}" for i in range(cells.n_obs)]
    path = tmp_path_factory.mktemp("finetune") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def config(
    export: Path, demo: Path, folder: Path, fit: FitOptions | None = None, **asked: Any
) -> FinetuneConfig:
    fit = fit or FitOptions(epochs=6, batch=16, lr=1e-2, head_lr=1e-2)
    job = FinetuneOptions(model=str(export), data=str(demo), **asked)
    return FinetuneConfig(run=PlaceOptions(dir=str(folder)), finetune=job, fit=fit)


def test_what_the_job_cannot_do_is_said_before_it_starts(export: Path, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"data": None}, "finetune.data: no file is given"),
        ({"data": str(tmp_path / "no.h5ad")}, "cannot be read as .h5ad"),
        ({"method": "few_shot", "init": "random"}, "starts from the model's own weights"),
        ({"method": "few_shot", "kind": "regression", "target": ["total"]}, "few_shot is a classification"),
        ({"kind": "regression", "target": ["total"], "shots": 3}, "finetune.shots"),
    ]
    for changed, message in refused:
        base = config(export, demo, out)
        with pytest.raises(InputError, match=message):
            run(replace(base, finetune=replace(base.finetune, **changed)))
    (tmp_path / "texts.tsv").write_text("B cell\tCL:0000236\n")
    with pytest.raises(InputError, match="has no text of"):
        run(config(export, demo, out, method="few_shot", texts=str(tmp_path / "texts.tsv")))
    names = anndata.read_h5ad(demo, backed="r").obs["cell_type"].unique()
    (tmp_path / "same.tsv").write_text("".join(f"{name}\ta cell of the blood\n" for name in names))
    with pytest.raises(InputError, match=r"finetune\.texts: .* have the same text \('.*a cell of the blood"):
        run(config(export, demo, out, method="few_shot", texts=str(tmp_path / "same.tsv")))
    with pytest.raises(InputError, match=r"finetune\.symbols: nowhere\.tsv"):
        run(config(export, demo, out, symbols="nowhere.tsv"))
    with pytest.raises(InputError, match=r"score\.min_score is of annotating"):
        run(replace(config(export, demo, out), score=AnnotateOptions(min_score=0.3)))
    model = Pretrained.from_pretrained(export, "cpu")
    stated = {"finetuned": {"kind": "classification", "target": "type"}}
    replace(model, config=model.config | stated).save_pretrained(tmp_path / "ce")
    with pytest.raises(InputError, match="left the space of the texts"):
        run(config(tmp_path / "ce", demo, out, method="few_shot"))
    with pytest.raises(InputError, match="is a URI"):
        run(replace(config(export, demo, out), run=PlaceOptions(dir="s3://bucket/run")))
    assert not out.exists()
    (out / "model").mkdir(parents=True)
    (out / "model" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"out/model is there, and no epoch of this fine-tuning beside it"):
        run(config(export, demo, out))
    assert [path.name for path in (out / "model").iterdir()] == ["thesis.tex"]


def test_real_cells_are_learnt(export: Path, demo: Path) -> None:
    """An untrained encoder of one layer, on cells of four types: far above the most frequent one."""
    model = Pretrained.from_pretrained(export, "cpu")
    asked = FinetuneOptions(data=str(demo), val_share=0)
    study = read_study(asked, model, seed=0)
    cells, target = study.part(study.split.train)
    options = FitOptions(epochs=8, batch=16, lr=1e-2, head_lr=1e-2)
    made = fit_classifier(model.model, cells, target, outputs=4, options=options)
    tested, truth = study.part(study.split.test)
    accuracy = (made(tested).argmax(1) == truth).float().mean()
    constant = truth.bincount().max() / len(truth)
    assert accuracy > constant + 0.15, (accuracy, constant)


def test_shots_and_empty_cells(export: Path, demo: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(demo)
    cells.X[5] = 0
    cells.X.eliminate_zeros()
    cells.obs = cells.obs.drop(columns="raw_sum")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = Pretrained.from_pretrained(export, "cpu")
    study = read_study(FinetuneOptions(data=str(tmp_path / "cells.h5ad"), shots=3), model, seed=0)
    assert study.left_out == {"no gene of the model's vocabulary": 1}
    assert cells.obs_names[5] not in study.names
    assert len(study.cells) == len(study.names) == len(study.labels) == cells.n_obs - 1
    assert np.bincount(study.labels.value[study.split.train]).tolist() == [3] * 4
    again = read_study(FinetuneOptions(data=str(tmp_path / "cells.h5ad")), model, seed=0)
    assert again.split.test.tolist() == study.split.test.tolist(), "shots leave the test cells alone"
    assert len(again.split.val)
    assert not len(study.split.val), "no label is seen beside the shots"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_the_job_makes_a_model_that_predicts(
    ray_session: None, export: Path, demo: Path, tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    told = config(export, demo, tmp_path / "out", mode=mode, num_workers=2, split_by="donor")
    summary = run(told)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["split"]["train"] + summary["split"]["val"] + summary["split"]["test"] == 240
    margin = 0.1 if mode == "full" else 0.0
    assert summary["test"]["model"]["accuracy"] >= summary["test"]["constant"]["accuracy"] + margin
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2, 3, 4, 5, 6]
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    cells = anndata.read_h5ad(demo)
    found = predict(cells, tmp_path / "out" / "model").loc[table.index]
    assert found["langcell_cell_type"].tolist() == table["langcell_cell_type"].tolist()
    assert cells.obs.loc[table.index, "cell_type"].tolist() == table["cell_type"].tolist()
    right = (table["langcell_cell_type"].astype(str) == table["cell_type"].astype(str)).mean()
    assert right == pytest.approx(summary["test"]["model"]["accuracy"])
    card = ModelCard((tmp_path / "out" / "model" / "README.md").read_text())
    assert card.text.strip().startswith("# tiny, fine-tuned\n\nclassifier of cell_type (classification)")
    assert 'langcell.predict(adata, "THIS FOLDER")' in card.text
    capfd.readouterr()
    again = run(told)  # everything is there
    assert "resume   after 6 of 6 epochs" in capfd.readouterr().out
    assert again["test"] == summary["test"]
    with pytest.raises(InputError, match="of other cells, options or weights"):
        run(replace(told, fit=replace(told.fit, seed=1)))


@pytest.mark.slow
def test_a_job_that_is_interrupted_says_so(export: Path, demo: Path, tmp_path: Path) -> None:
    """Exit code 75 and what goes on from it: Ray Train's own handler of ctrl-C ends a job with 0."""
    options = [f"--run.dir={tmp_path / 'out'}", "--run.ray_address=local", "--fit.epochs=1000"]
    options += [f"--finetune.model={export}", f"--finetune.data={demo}", "--finetune.num_workers=1"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([sys.executable, str(JOB), *options], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "out").rglob("epoch-*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGINT)
        assert job.wait(120) == RESUME, (tmp_path / "log").read_text()
    finally:
        end(job)
    assert "what was committed stands; the same command goes on\n" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_not_tried_again(
    ray_session: None, export: Path, demo: Path, tmp_path: Path
) -> None:
    """Another try would end as the first: what is raised is its message, not that workers failed."""
    fit = FitOptions(epochs=1, batch=16, lr=1e30, head_lr=1e30)
    with pytest.raises(RunError, match=r"^epoch 1: the loss is .*; lower fit\.lr and fit\.head_lr"):
        run(config(export, demo, tmp_path / "out", fit, num_workers=2))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target", "measures"),
    [
        ("regression", ["total"], {"mae", "rmse", "r2", "pearson"}),
        ("multilabel", ["large", "has_first"], {"macro_f1", "micro_f1", "average_precision", "auroc"}),
    ],
)
def test_numbers_and_several_labels(
    ray_session: None,
    export: Path,
    demo: Path,
    tmp_path: Path,
    kind: Any,
    target: list[str],
    measures: set[str],
) -> None:
    summary = run(config(export, demo, tmp_path / "out", kind=kind, target=target, init="random"))
    found, constant = summary["test"]["model"], summary["test"]["constant"]
    assert found.keys() == constant.keys() == measures
    better: Callable[[str], float] = lambda name: found[name] - constant[name]  # noqa: E731
    assert better("auroc") > 0.1 if kind == "multilabel" else better("mae") < 0
    model = FineTuned.from_pretrained(tmp_path / "out" / "model")
    assert model.head.kind == kind
    assert model.head.source == "tiny (random)"
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    name = f"langcell_{model.head.target}"
    cells = anndata.read_h5ad(demo)
    again = predict(cells, model).loc[table.index, name]
    if kind == "regression":
        np.testing.assert_allclose(again, table[name], rtol=1e-3)
        assert np.abs(table["total"] - table[name]).mean() == pytest.approx(found["mae"])
    else:
        assert again.tolist() == table[name].tolist()


@pytest.mark.slow
def test_few_shot_of_both_encoders(ray_session: None, export: Path, demo: Path, tmp_path: Path) -> None:
    fit = FitOptions(epochs=2, batch=4, lr=1e-4)
    told = config(export, demo, tmp_path / "out", fit, method="few_shot", shots=2, val_share=0)
    told.finetune.test_share = 0.1
    summary = run(told)
    assert summary["split"]["train"] == 8
    assert summary["split"]["val"] == 0
    assert "2 training cells of each class at most" in summary["split"]["rule"]
    assert [row["val_loss"] for row in summary["epochs"]] == [None, None]
    model = Pretrained.from_pretrained(tmp_path / "out" / "model")
    before = Pretrained.from_pretrained(export)
    texts = tokenize(model.tokenizer, ["cell type: B cell; "], 64)
    assert not torch.equal(model.model.project_texts(texts), before.model.project_texts(texts))
    lines = (tmp_path / "out" / "model" / "candidates.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == summary["classes"]
    assert all(line.split("\t")[1].startswith("CL:") for line in lines)
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    cells = anndata.read_h5ad(demo)[table.index].copy()
    langcell.annotate(cells, model, tmp_path / "out" / "model" / "candidates.tsv", progress=False)
    assert cells.obs["langcell_label"].tolist() == table["langcell_cell_type"].tolist()
    # The same cells under each other's texts are another training.
    classes, terms = zip(*(line.split("\t") for line in lines), strict=True)
    swapped = [f"{name}\t{term}\n" for name, term in zip(classes, terms[::-1], strict=True)]
    (tmp_path / "texts.tsv").write_text("".join(swapped))
    with pytest.raises(InputError, match="of other cells, options or weights"):
        run(replace(told, finetune=replace(told.finetune, texts=str(tmp_path / "texts.tsv"))))
