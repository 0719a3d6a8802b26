"""jobs/evaluate.py: what is evaluated, by which rules, and the whole job on a few real cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from transformers import BertConfig

from langcell.census.demo import demo_adata
from langcell.config import EvaluateConfig, parse_tree
from langcell.corpus.blocks import sample_cells
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from langcell.inference.pretrained import Pretrained
from langcell.recipes import evaluate
from langcell.recipes.benchmarks import pathways
from langcell.recipes.benchmarks.data import read_cohort
from langcell.recipes.benchmarks.few_shot import few_shot
from langcell.recipes.benchmarks.methods import Methods
from langcell.recipes.evaluate import _Parts
from langcell.recipes.options import EvaluateOptions, PlaceOptions
from tests.recipes.making import ROOT

PRESET = ROOT / "jobs" / "configs" / "evaluate.yaml"
TYPES = ["B cell", "dendritic cell", "CD14-positive monocyte"]


@pytest.fixture(scope="module")
def model(export: Path) -> Pretrained:
    return Pretrained.from_pretrained(export, "cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve cells of each of three types under labels of their own, two of them without a type."""
    adata = demo_adata()
    rows = np.concatenate([np.flatnonzero(adata.obs["cell_type"] == name)[:12] for name in TYPES])
    adata = adata[rows].copy()
    celltype = adata.obs["cell_type"].astype(object).replace({"B cell": "CD19+ B"})
    celltype.iloc[:2] = np.nan
    adata.obs = pd.DataFrame(
        {
            "celltype": pd.Categorical(celltype),
            "organ": "blood",
            "raw_sum": adata.obs["raw_sum"],
            "activated": np.arange(len(rows)) % 2 == 0,
        },
        index=adata.obs_names,
    )
    path = tmp_path_factory.mktemp("study") / "study.h5ad"
    adata.write_h5ad(path)
    (path.parent / "terms.yaml").write_text("CD19+ B: CL:0000236\n")
    return path


def _asked(study: Path, **changed: Any) -> EvaluateOptions:
    given = {"data": str(study), "label": "celltype", "terms": str(study.parent / "terms.yaml")}
    return EvaluateOptions(**{**given, **changed})


def test_the_cells_of_a_file_are_read_with_what_the_parts_need(study: Path, model: Pretrained) -> None:
    cohort = read_cohort(_asked(study, facets={"tissue": "organ"}), model)
    assert len(cohort.packed) == len(cohort.obs) == 36
    assert cohort.facets["cell_type"].labels["CL:0000236"] == "B cell"
    assert cohort.facets["cell_type"].left_out == {"nan: says nothing": 2}
    assert cohort.label_N[:3].tolist() == ["", "", "CD19+ B"]
    assert set(cohort.facets["tissue"].term_N) == {"UBERON:0000178"}
    np.testing.assert_allclose(np.linalg.norm(cohort.z_NP, axis=1), 1, atol=1e-5)
    raw = anndata.read_h5ad(study)
    expected = np.log1p(raw.X.toarray() / raw.obs["raw_sum"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(cohort.features_NG.toarray(), expected, rtol=1e-6)
    assert "is not known here" in cohort.about["left_out"]
    assert cohort.about["left_out_cells"] == 0


def test_silent_cells_are_left_out_and_counted(study: Path, model: Pretrained, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(study)
    counts = adata.X.tocsr()
    counts.data[counts.indptr[5] : counts.indptr[6]] = 0
    counts.eliminate_zeros()
    adata.X = counts
    adata.write_h5ad(tmp_path / "silent.h5ad")
    cohort = read_cohort(_asked(study, data=str(tmp_path / "silent.h5ad")), model)
    assert cohort.about["silent_cells"] == 1
    assert len(cohort.packed) == len(cohort.obs) == len(cohort.label_N) == cohort.about["cells"] == 35
    assert adata.obs_names[5] not in cohort.obs.index
    whole = read_cohort(_asked(study), model)
    np.testing.assert_allclose(cohort.z_NP, np.delete(whole.z_NP, 5, 0), atol=1e-6)


def test_test_cells_of_types_that_no_cell_teaches_are_left_out(
    study: Path, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of the file decides, and one type stands on one side alone."""
    cohort = read_cohort(_asked(study), model)
    types = np.unique(cohort.label_N)
    alone = cohort.label_N == types[-1]
    group = np.where(alone, "test", np.where(np.arange(len(alone)) % 2, "train", "test"))
    cohort.obs["part"] = group
    config = EvaluateConfig(evaluate=_asked(study, split="part", parts=["finetuning"]))
    asked: list[np.ndarray] = []

    def predict(shown: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
        asked.append(rows)
        return np.unique(cohort.label_N, return_inverse=True)[1][rows]

    monkeypatch.setattr(Methods, "of_labels", lambda self, class_N: {"knows": predict})
    parts = _Parts(config, model, cohort, tmp_path)
    found = parts.finetuning()
    assert set(cohort.label_N[asked[0]]) == set(types[1:-1])
    assert found["methods"]["knows"]["accuracy"]["mean"] == 1
    assert found["split"]["left_out"] == {
        "no type, or the only cell of its type": 2,
        "class of no training cell": alone.sum(),
    }
    assert alone[parts.split.test].sum() == alone.sum(), "of pathways they are as good a test as any"
    # One type to learn from costs this part alone.
    cohort.obs["part"] = np.where(alone, "train", "test")
    reason = _Parts(config, model, cohort, tmp_path).finetuning()["empty"]
    assert reason.startswith("evaluate.split: every training cell is")


def test_what_these_cells_cannot_show_costs_the_other_parts_nothing(
    study: Path, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = read_cohort(_asked(study), model)
    cohort.obs["batch"] = ["one", "two", None] * 12
    config = EvaluateConfig(evaluate=_asked(study, batch="batch"))
    seen: list[str] = []
    monkeypatch.setattr(evaluate, "integration", lambda spaces, label, batch, **_: seen.extend(batch) or {})
    found = _Parts(config, model, cohort, tmp_path).integration()
    typed = int((cohort.label_N[cohort.obs["batch"].notna()] != "").sum())
    assert (found["n"], found["batches"], found["without_batch"]) == (typed, 2, 12)
    assert set(seen) == {"one", "two"}
    cohort.label_N[:] = "B cell"
    parts = _Parts(config, model, cohort, tmp_path)
    assert parts.clustering() == {"empty": "1 type in obs['celltype'], at least two are needed"}
    assert parts.finetuning()["empty"].startswith("evaluate.split: every training cell is")
    cohort.label_N[:] = ""
    parts = _Parts(config, model, cohort, tmp_path)
    for name in ("finetuning", "pathways"):
        assert getattr(parts, name)()["empty"].startswith("evaluate.split: no cell to train")


def test_a_start_that_does_not_fit_is_said_before_any_part(
    study: Path, model: Pretrained, tmp_path: Path
) -> None:
    cohort = read_cohort(_asked(study), model)
    config = EvaluateConfig(evaluate=_asked(study, parts=["few_shot"], geneformer=str(tmp_path)))
    with pytest.raises(InputError, match=r"evaluate\.geneformer: no model configuration at"):
        _Parts(config, model, cohort, tmp_path)
    of_another = BertConfig(
        vocab_size=model.vocabulary.size, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    of_another.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"evaluate\.geneformer: .* has hidden_size 64, the model 32"):
        _Parts(config, model, cohort, tmp_path)


def test_a_part_that_fails_costs_none_before_it(
    study: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: _Parts) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(_Parts, "clustering", fail)
    config = EvaluateConfig(
        run=PlaceOptions(dir=str(tmp_path)),
        evaluate=_asked(study, model=str(export), parts=["retrieval", "clustering"]),
    )
    with pytest.raises(OSError, match="no space left"):
        evaluate.run(config)
    assert json.loads((tmp_path / "summary.json").read_text())["retrieval"]["cell_to_text"]["queries"] == 34
    assert "## Retrieval" in (tmp_path / "tables.md").read_text()


def test_cells_of_a_column_that_says_val_are_counted(study: Path, model: Pretrained, tmp_path: Path) -> None:
    cohort = read_cohort(_asked(study), model)
    cohort.obs["part"] = np.resize(["Train", "Test", "Val"], len(cohort.obs))
    config = EvaluateConfig(evaluate=_asked(study, split="part", parts=["finetuning"]))
    found = _Parts(config, model, cohort, tmp_path).split
    assert found.left_out["obs['part'] says val"] == 34 - len(found.train) - len(found.test) == 12


def test_a_fine_tuned_model_is_not_evaluated_where_it_may_have_learnt(
    demo_corpus: Path, model: Pretrained
) -> None:
    tuned = replace(model, config={**model.config, "finetuned": {"kind": "few_shot", "target": "t"}})
    with pytest.raises(InputError, match=r"evaluate\.corpus: tiny was fine-tuned after"):
        read_cohort(EvaluateOptions(corpus=str(demo_corpus)), tuned)


def test_a_sample_is_seeded_and_said(study: Path, model: Pretrained) -> None:
    one, again, other = (read_cohort(_asked(study, max_cells=10, seed=s), model) for s in (0, 0, 1))
    assert one.about["cells"] == len(one.obs) == 10
    assert one.about["cells_given"] == 36
    assert one.obs.index.tolist() == again.obs.index.tolist() != other.obs.index.tolist()


def test_cells_that_the_model_was_trained_on_are_left_out(demo_corpus: Path, model: Pretrained) -> None:
    cohort = read_cohort(EvaluateOptions(corpus=str(demo_corpus)), model)
    manifest = Manifest.read(str(demo_corpus))
    of = {
        split: set(sample_cells(str(demo_corpus), manifest, split, 700, 0, ("soma_joinid",))[0].to_pylist())
        for split in ("train", "val", "test", "held_out")
    }
    evaluated = set(cohort.obs["soma_joinid"])
    assert evaluated == of["test"] | of["held_out"]
    assert not evaluated & (of["train"] | of["val"])
    assert cohort.about["left_out_cells"] == len(of["train"]) + len(of["val"]) > 0


def test_a_model_of_another_corpus_is_refused(demo_corpus: Path, model: Pretrained) -> None:
    of_another = replace(model, config={**model.config, "corpus_hash": "0" * 32})
    with pytest.raises(InputError, match="was trained on another corpus"):
        read_cohort(EvaluateOptions(corpus=str(demo_corpus)), of_another)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": "type"}, r"evaluate.label: obs has no column type; it has: celltype, organ"),
        ({"facets": {"tissue": "place"}}, "evaluate.facets.tissue: obs has no column place"),
        ({"terms": "nowhere.yaml"}, "evaluate.terms: nowhere.yaml cannot be read"),
        ({"data": "nowhere.h5ad"}, "evaluate.data: nowhere.h5ad cannot be read"),
        ({"corpus": "anywhere"}, "evaluate.corpus: obs has no column soma_joinid"),
    ],
)
def test_what_is_wrong_is_named(
    study: Path, model: Pretrained, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_cohort(_asked(study, **changed), model)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--evaluate.shots=[5,1]", "evaluate.shots"),
        ("--evaluate.recall=[0]", "evaluate.recall"),
        ("--evaluate.facets={cell_type: x}", "evaluate.label"),
        ("--evaluate.pathway_columns=[x]", r"give one of them \(--evaluate.pathways null"),
        ("--fit.seed=1", "fit.seed: the seeds of an evaluation are evaluate.seed"),
        ("--evaluate.parts=[]", "evaluate.parts: none is asked for"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_read(option: str, message: str) -> None:
    config, _ = parse_tree(EvaluateConfig, "", PRESET, [option])
    with pytest.raises(InputError, match=message):
        evaluate.run(config)


def test_every_method_sees_the_same_shots_and_the_same_cells() -> None:
    class_N = np.array([0] * 20 + [1] * 30 + [2] * 4 + [-1] * 9)
    seen: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], int]]] = {"oracle": [], "first": []}

    def method(name: str) -> Any:
        def predict(shown: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
            seen[name].append((tuple(shown), tuple(asked), seed))
            assert not set(shown) & set(asked)
            return class_N[asked] if name == "oracle" else np.zeros(len(asked), np.int64)

        return predict

    lines: list[str] = []
    result = few_shot(
        class_N,
        {name: method(name) for name in seen},
        [1, 5],
        [0, 1, 2],
        {"ct": np.where(class_N < 0, -1, class_N)},
        lines.append,
    )
    assert seen["oracle"] == seen["first"]
    assert [len(shown) for shown, _, _ in seen["oracle"]] == [2, 2, 2, 10, 10, 10]
    assert len({asked for _, asked, seed in seen["oracle"] if seed == 1}) == 1
    assert result["classes"] == [0, 1]
    assert result["n"] == 20 + 30 - 2 * 5
    assert result["methods"]["oracle"]["5"]["accuracy"] == {"mean": 1.0, "by_seed": [1.0] * 3}
    assert result["methods"]["first"]["1"]["balanced_accuracy"]["mean"] == 0.5 == result["chance"]
    assert result["constant"]["accuracy"]["mean"] == pytest.approx(25 / 40)
    assert result["zero_shot"]["ct"]["accuracy"]["mean"] == 1.0
    assert lines[0] == "  oracle, 1 shots: 1.000"


def test_too_few_cells_for_the_shots_are_no_curve() -> None:
    result = few_shot(np.array([0, 0, 0, 1, 1]), {}, [1, 10], [0], {}, print)
    assert result == {"empty": "fewer than two classes have cells enough for 10 shots and a test"}


def test_a_pathway_is_high_by_its_genes_and_the_training_cells_alone() -> None:
    random = np.random.default_rng(0)
    counts = random.gamma(1.0, size=(80, 6))
    train = np.arange(40)
    high = pathways.high_NL(sp.csr_matrix(counts), [np.array([0, 2, 3])], train)
    z = (counts - counts[:40].mean(0)) / counts[:40].std(0)
    score = z[:, [0, 2, 3]].mean(1)
    np.testing.assert_array_equal(high[:, 0], score > np.quantile(score[:40], 0.75))
    assert high[:40].mean() == 0.25
    changed = counts.copy()
    changed[40:] *= 100
    again = pathways.high_NL(sp.csr_matrix(changed), [np.array([0, 2, 3])], train)
    np.testing.assert_array_equal(again[:40], high[:40])  # test cells decide nothing
    assert again[40:].all()


def test_genes_of_a_set_are_found_by_the_naming_that_fits(tmp_path: Path) -> None:
    var = pd.DataFrame(
        {"feature_name": ["CD3D", "CD3E", "LCK", "MS4A1"]}, index=["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
    )
    path = tmp_path / "sets.gmt"
    path.write_text("T\thttp://x\tCD3D\tCD3E\tLCK\tNONE\nB\t\tMS4A1\tCD19\n")
    sets = pathways.read_gmt(str(path))
    assert sets == {"T": ["CD3D", "CD3E", "LCK", "NONE"], "B": ["MS4A1", "CD19"]}
    found = pathways.set_columns(sets, var)
    assert {name: columns.tolist() for name, columns in found.items()} == {"T": [0, 1, 2]}
    path.write_text("CD3D\nCD3E\n")
    with pytest.raises(InputError, match=r"is no \.gmt file"):
        pathways.read_gmt(str(path))


def test_heads_find_what_the_space_holds_and_the_constant_nothing() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 3))
    label_NL = np.stack([x[:, 0] > 0.7, x[:, 1] > 0, np.ones(200, bool)], axis=1)
    train, test = np.arange(100), np.arange(100, 200)
    methods = {"space": pathways.heads(x, 0), "noise": pathways.heads(random.normal(size=(200, 3)), 0)}
    result = pathways.multi_label(methods, label_NL, train, test)
    assert (result["pathways"], result["one_valued"], result["n"]) == (2, 1, 100)
    assert result["methods"]["space"]["auroc"] > 0.97
    assert 0.3 < result["methods"]["noise"]["auroc"] < 0.7
    prevalence = label_NL[test, :2].mean(0)
    constant = result["methods"]["constant"]
    assert constant["auroc"] == 0.5
    assert constant["average_precision"] == pytest.approx(prevalence.mean())
    assert constant["macro_f1"] == pytest.approx((2 * prevalence / (1 + prevalence)).mean())
    assert "empty" in pathways.multi_label({}, np.ones((200, 2), bool), train, test)


def test_columns_of_obs_must_say_yes_or_no() -> None:
    obs = pd.DataFrame({"a": [True, False], "b": [0, 1], "c": [0, 2]})
    assert pathways.stated_NL(obs, ["a", "b"]).tolist() == [[True, False], [False, True]]
    with pytest.raises(InputError, match=r"obs\['c'\] must hold true and false"):
        pathways.stated_NL(obs, ["a", "c"])


@pytest.mark.slow  # fine-tunes both encoders a few times
def test_the_job_measures_every_part_of_a_few_cells(export: Path, study: Path, tmp_path: Path) -> None:
    argv = [
        f"--run.dir={tmp_path / 'run'}",
        f"--evaluate.model={export}",
        f"--evaluate.data={study}",
        "--evaluate.label=celltype",
        f"--evaluate.terms={study.parent / 'terms.yaml'}",
        "--evaluate.facets={tissue: organ}",
        "--evaluate.batch=organ",
        "--evaluate.pathways=null",
        "--evaluate.pathway_columns=[activated]",
        f"--evaluate.geneformer={export / 'cell_bert'}",
        "--evaluate.shots=[1,2]",
        "--evaluate.seeds=1",
        "--evaluate.shot_steps=1",
        "--evaluate.top_k=1",
        "--fit.epochs=1",
    ]
    config, _ = parse_tree(EvaluateConfig, "", PRESET, argv)
    returned = evaluate.run(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    assert summary["zero_shot"]["cell_type"]["ct"]["n"] == 34
    assert summary["zero_shot"]["cell_type"]["unscored"] == {"nan: says nothing": 2}
    assert summary["zero_shot"]["tissue"]["empty"] == "1 candidate, at least two are needed"
    curves = summary["few_shot"]
    assert set(curves["methods"]) == {
        "langcell",
        "langcell_ce",
        "geneformer",
        "logistic_regression",
        "prototypes",
    }
    # The start that is named here is the model's own: another road to the same weights, and figures.
    for found in (curves, summary["finetuning"]):
        assert found["methods"]["geneformer"] == found["methods"]["langcell_ce"]
    assert curves["n"] == 34 - 3 * 2
    assert set(curves["zero_shot"]) == {"ct", "two_step"}
    assert summary["finetuning"]["split"]["train"] + summary["finetuning"]["split"]["test"] == 34
    assert "20%" in summary["finetuning"]["split"]["rule"]
    assert summary["retrieval"]["cell_to_text"]["queries"] == 34
    assert "of one batch" in summary["integration"]["empty"]
    assert set(summary["clustering"]["spaces"]) == {"X_langcell", "X_pca"}
    assert set(summary["pathways"]["methods"]) == {
        "constant",
        "langcell_ce",
        "X_langcell",
        "X_pca",
        "logistic_regression",
    }
    written = (tmp_path / "run" / "tables.md").read_text()
    for title in evaluate.TITLES.values():
        assert f"## {title}" in written
    assert "2 cells have no term and are left out: nan: says nothing (2)" in written
    for name in ("zero_shot.png", "few_shot.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
