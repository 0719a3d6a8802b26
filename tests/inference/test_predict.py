"""A fine-tuned model is read as it was saved, and says in obs what its outputs mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from langcell.batch import Packed
from langcell.census.demo import demo_adata
from langcell.errors import InputError
from langcell.inference.annotate import COLUMNS, counts_of
from langcell.inference.measures import multilabel_measures, regression_measures
from langcell.inference.predict import FineTuned, Head, outputs, predict, states
from langcell.inference.pretrained import Pretrained
from langcell.model.classifier import classifier, merge

CLASSES = ("B cell", "T cell", "monocyte")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    found = demo_adata()[:9].copy()
    found.X[3] = 0  # an empty droplet
    found.X.eliminate_zeros()
    found.obs = found.obs.drop(columns="raw_sum")
    return found


def tuned(export: Path, head: Head) -> FineTuned:
    base = Pretrained.from_pretrained(export, "cpu")
    made = classifier(base.model.cell_bert, head.outputs, "lora", lora_rank=2, seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "head" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return FineTuned.of(base, merge(made), head)


def test_what_is_saved_is_read_again(export: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    model = tuned(export, Head("type", "classification", CLASSES, source="tiny"))
    model.save_pretrained(tmp_path / "model")
    again = FineTuned.from_pretrained(tmp_path / "model", "cpu")
    assert again.head == model.head
    sentences = counts_of(cells, model.base).sentences(0, 9)
    torch.testing.assert_close(
        outputs(again.classifier, sentences, 200), outputs(model.classifier, sentences, 999)
    )
    original = Pretrained.from_pretrained(export, "cpu")
    assert not torch.equal(again.base.model.cell_states(sentences), original.model.cell_states(sentences)), (
        "the export around it has the fine-tuned encoder"
    )
    assert again.base.config["finetuned"] == {"target": "type", "kind": "classification"}
    assert again.base.beta.hash == original.beta.hash


def test_labels_and_probabilities_stand_in_obs(export: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    model = tuned(export, Head("type", "classification", CLASSES))
    model.save_pretrained(tmp_path / "model")
    here = cells.copy()
    table = predict(here, tmp_path / "model", chunk=4)
    assert list(table) == ["langcell_type", "langcell_type_probability"]
    assert table.index.equals(here.obs.index)
    assert here.obs["langcell_type"].dtype == "category"
    assert list(here.obs["langcell_type"].cat.categories) == list(CLASSES)
    assert here.obs["langcell_type"].isna().tolist() == [i == 3 for i in range(9)]
    logits = outputs(model.classifier, counts_of(cells, model.base).sentences(0, 9), 10_000)
    full = np.arange(9) != 3
    assert here.obs["langcell_type"][full].tolist() == [CLASSES[i] for i in logits[full].argmax(1)]
    expected = (logits.exp() / logits.exp().sum(1, keepdim=True)).max(1).values
    np.testing.assert_allclose(table["langcell_type_probability"][full], expected[full], rtol=1e-4)
    here.write_h5ad(tmp_path / "predicted.h5ad")
    backed = anndata.read_h5ad(tmp_path / "predicted.h5ad", backed="r")
    pd.testing.assert_frame_equal(predict(backed, model), table)


def test_a_number_is_told_in_its_own_unit(export: Path, cells: anndata.AnnData) -> None:
    model = tuned(export, Head("age", "regression", mean=40.0, std=10.0))
    table = predict(cells.copy(), model)
    z = outputs(model.classifier, counts_of(cells, model.base).sentences(0, 9), 10_000)[:, 0]
    expected = np.where(np.arange(9) == 3, np.nan, z.numpy() * 10 + 40)
    np.testing.assert_allclose(table["langcell_age"], expected, rtol=1e-4)


def test_an_annotation_and_a_prediction_share_no_column(cells: anndata.AnnData) -> None:
    table = Head("label", "classification", CLASSES).columns(torch.eye(3))
    assert list(table) == ["langcell_predicted_label", "langcell_predicted_label_probability"]
    assert not {f"langcell_{name}" for name in COLUMNS} & set(table)


def test_several_labels_are_joined() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1, -1, -1]])
    table = Head("pathway", "multilabel", ("a", "b", "c")).columns(logits)
    assert table["langcell_pathway"].tolist() == ["a||c", ""]
    np.testing.assert_allclose(
        table["langcell_pathway_a_probability"], 1 / (1 + np.exp([-2.0, 1.0])), rtol=1e-6
    )
    assert len(table.columns) == 4


def test_states_do_not_depend_on_the_cut(export: Path) -> None:
    made = tuned(export, Head("type", "classification", CLASSES)).classifier
    cells = Packed.from_sequences([[767, 5, 9, 2], [767, 700], [767, 8, 1]])
    found = states(made, cells, 4)
    torch.testing.assert_close(found, made.states(cells).detach())
    torch.testing.assert_close(made(found), outputs(made, cells, 100))
    made.head(found).sum().backward()  # no tensor of inference mode


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_an_export_without_a_head_says_so(export: Path, tmp_path: Path, name: str) -> None:
    tuned(export, Head("type", "classification", CLASSES)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(InputError, match=name):
        FineTuned.from_pretrained(tmp_path / "model")


def test_a_head_of_another_model_is_refused(export: Path, tmp_path: Path) -> None:
    for name, classes in (("three", CLASSES), ("two", CLASSES[:2])):
        tuned(export, Head("type", "classification", classes)).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "two" / "head.json", tmp_path / "three" / "head.json")
    with pytest.raises(InputError, match="wrong shape"):
        FineTuned.from_pretrained(tmp_path / "three")
    (tmp_path / "three" / "head.json").write_text(json.dumps({"kind": "classification"}))
    with pytest.raises(InputError, match=r"head\.json"):
        FineTuned.from_pretrained(tmp_path / "three")


def test_measures_by_hand() -> None:
    found = regression_measures(np.array([1.0, 2, 3, 6]), np.array([2.0, 2, 4, 4]))
    assert found["mae"] == 1.0
    assert found["rmse"] == pytest.approx(1.5**0.5)
    assert found["r2"] == pytest.approx(1 - 6 / 14)
    assert found["pearson"] == pytest.approx(6 / (14 * 4) ** 0.5)
    constant = regression_measures(np.array([1.0, 3]), np.array([2.0, 2]))
    assert (constant["r2"], constant["pearson"]) == (0.0, None)
    truth = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    p = np.array([[0.9, 0.1, 0.9], [0.6, 0.1, 0.9], [0.4, 0.1, 0.9], [0.2, 0.1, 0.1]])
    found = multilabel_measures(truth, p)
    assert found["auroc"] == pytest.approx(3 / 4)  # of the first label alone: 3 of 4 pairs in order
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert found["macro_f1"] == pytest.approx((1 / 2 + 0 + 6 / 7) / 3)
    assert multilabel_measures(truth[:, 2:], p[:, 2:])["auroc"] is None
    alone = multilabel_measures(truth[:, :1], p[:, :1])
    assert (
        alone["macro_f1"] == alone["micro_f1"] == pytest.approx(1 / 2)
    )  # of having it; not having it is no class
