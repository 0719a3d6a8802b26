"""Annotation in scanpy's manner: what is written, from what, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import langcell
from langcell.batch import Packed
from langcell.census.demo import demo_adata
from langcell.errors import InputError
from langcell.inference.annotate import Annotator, _belief, choose, majority
from langcell.inference.embed import tokenize
from langcell.inference.options import AnnotateOptions
from langcell.inference.pretrained import Pretrained
from langcell.inference.roll_up import roll_up
from langcell.inference.scoring import Scores, zero_shot

TYPES = ["B cell", "natural killer cell", "dendritic cell", "CL:0000084"]


@pytest.fixture(scope="module")
def model(export: Path) -> Pretrained:
    return Pretrained.from_pretrained(export)


@pytest.fixture
def cells() -> anndata.AnnData:
    return demo_adata()[:12].copy()


def test_columns_say_what_the_scores_say(model: Pretrained, cells: anndata.AnnData) -> None:
    langcell.annotate(cells, model, TYPES, top_k=2, a=0.3, chunk=5, progress=False)
    annotator = Annotator(model, choose(model, TYPES, ()), AnnotateOptions(top_k=2, a=0.3))
    counts = [int(n) for n in np.diff(cells.X.indptr)]
    assert min(counts) > 50
    # The same by the function that the released form was checked against, all cells at once.
    sentences = _sentences(model, cells)
    scores = zero_shot(
        model.model,
        sentences,
        tokenize(model.tokenizer, [one.text for one in annotator.candidates], model.text.max_length),
        tau=model.tau,
        a=0.3,
        top_k=2,
        batch_tokens=100_000,
    )
    assert scores.two_step_NC is not None
    names = np.array([one.label for one in annotator.candidates])
    best = scores.two_step_NC.argmax(1).numpy()
    assert cells.obs["langcell_label"].tolist() == names[best].tolist()
    assert cells.obs["langcell_id"].tolist() == [annotator.candidates[i].term for i in best]
    second = scores.two_step_NC.scatter(1, torch.from_numpy(best)[:, None], -np.inf).argmax(1).numpy()
    assert cells.obs["langcell_runner_up"].tolist() == names[second].tolist()
    rows = np.arange(len(best))
    np.testing.assert_allclose(cells.obs["langcell_logits1"], scores.ct_NC[rows, best], atol=1e-6)
    np.testing.assert_allclose(cells.obs["langcell_logits2"], scores.match_NC[rows, best], atol=1e-6)
    np.testing.assert_allclose(cells.obs["langcell_score"], scores.two_step_NC[rows, best], atol=1e-6)
    np.testing.assert_allclose(cells.obsm["X_langcell"], scores.z_NP, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(cells.obsm["X_langcell"], axis=1), 1, atol=1e-6)


def _sentences(model: Pretrained, cells: anndata.AnnData) -> Packed:
    """Each cell's genes by falling count over total over median, in plain NumPy."""
    token = {gene: i for i, gene in enumerate(model.vocabulary.gene_ids, 2)}
    median = dict(zip(model.beta.feature_id, model.beta.beta, strict=True))
    x = cells.X.toarray().astype(np.float64)
    value = (
        x / cells.obs["raw_sum"].to_numpy()[:, None] * 1e4 / np.array([median[g] for g in cells.var_names])
    )
    sentences = []
    for row in value:
        order = np.argsort(-row, kind="stable")[: np.count_nonzero(row)]
        genes = [token[cells.var_names[i]] for i in order]
        sentences.append([model.vocabulary.cls, *genes][: model.max_length])
    return Packed.from_sequences(sentences)


def test_embed_writes_the_same_embedding(model: Pretrained, export: Path, cells: anndata.AnnData) -> None:
    again = cells.copy()
    langcell.annotate(cells, model, TYPES, top_k=1, progress=False)
    langcell.embed(again, str(export), chunk=7, progress=False)
    np.testing.assert_allclose(again.obsm["X_langcell"], cells.obsm["X_langcell"], atol=1e-6)


def test_without_candidates_the_types_of_the_training_are_asked_for(
    model: Pretrained, cells: anndata.AnnData
) -> None:
    langcell.annotate(cells, model, top_k=1, progress=False)
    assert len(cells.uns["langcell"]["candidates"]) == 10
    assert [one.term for one in choose(model, None, ["blood"])] == model.known_types()
    with pytest.raises(InputError, match="no use beside candidates"):
        choose(model, TYPES, ["blood"])
    unknown = Pretrained(**{**vars_of(model), "types": model.types.slice(0, 0)})
    with pytest.raises(InputError, match="tiny does not say what cell types it was trained on; name"):
        choose(unknown, None, ())
    alone = Pretrained(**{**vars_of(model), "types": model.types.slice(0, 1)})
    label = model.types["label"][0].as_py()
    with pytest.raises(InputError, match=f"tiny was trained on {label} alone there; name"):
        choose(alone, None, ["blood"])


def vars_of(model: Pretrained) -> dict[str, Any]:
    names = ("model", "tokenizer", "vocabulary", "beta", "config", "types", "name", "card")
    return {name: getattr(model, name) for name in names}


def test_unsure_and_silent_cells_are_unassigned(model: Pretrained, cells: anndata.AnnData) -> None:
    cells.X[3] = 0
    cells.X.eliminate_zeros()
    langcell.annotate(cells, model, TYPES, top_k=2, roll_up=0.2, progress=False)
    silent = cells.obs.iloc[3]
    assert silent["langcell_label"] == silent["langcell_runner_up"] == "unassigned"
    assert silent["langcell_rolled_up"] == "unassigned"
    assert silent["langcell_score"] == 0
    assert (cells.obs["langcell_label"] == "unassigned").sum() == 1
    assert np.isfinite(cells.obsm["X_langcell"]).all()
    scores = cells.obs["langcell_score"].drop(cells.obs_names[3])
    bar = float(scores.sort_values().iloc[5])
    langcell.annotate(cells, model, TYPES, top_k=2, min_score=bar + 1e-6, key="strict", progress=False)
    assert ((cells.obs["strict_score"] < bar + 1e-6) == (cells.obs["strict_label"] == "unassigned")).all()
    assert 6 <= (cells.obs["strict_label"] == "unassigned").sum() < 12
    assert (cells.obs["strict_runner_up"] == "unassigned").sum() == 1, "a runner-up is no call"


def test_one_matched_candidate_decides_nothing(model: Pretrained, cells: anndata.AnnData) -> None:
    """A softmax over one is 1, which would pass for a sure answer."""
    contrast = cells.copy()
    langcell.annotate(contrast, model, TYPES, a=1.0, min_score=0.3, progress=False)
    langcell.annotate(cells, model, TYPES, top_k=1, min_score=0.3, progress=False)
    pd.testing.assert_frame_equal(cells.obs, contrast.obs)


def test_one_cell_and_a_result_that_can_be_saved(
    model: Pretrained, cells: anndata.AnnData, tmp_path: Path
) -> None:
    one = cells[:1].copy()
    one.obs["cluster"] = "a"
    langcell.annotate(
        one, model, {"B": "B cell", "else": "a cell that is none"}, roll_up=0.9, cluster="cluster"
    )
    one.write_h5ad(tmp_path / "one.h5ad")
    read = anndata.read_h5ad(tmp_path / "one.h5ad")
    assert read.obs["langcell_label"].tolist() == one.obs["langcell_label"].tolist()
    assert read.obs["langcell_majority"].tolist() == read.obs["langcell_label"].tolist()
    assert read.uns["langcell"]["beta_hash"] == model.beta.hash
    assert read.uns["langcell"]["texts"][1] == "a cell that is none"
    langcell.annotate(read, model, TYPES, a=1, progress=False)  # what a file says langcell wrote is replaced
    assert not {"langcell_rolled_up", "langcell_majority"} & set(read.obs)


def test_a_backed_file_gives_the_same(model: Pretrained, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    langcell.annotate(backed, model, TYPES, top_k=2, chunk=5, progress=False)
    langcell.annotate(cells, model, TYPES, top_k=2, progress=False)
    assert backed.obs["langcell_label"].tolist() == cells.obs["langcell_label"].tolist()
    np.testing.assert_allclose(backed.obsm["X_langcell"], cells.obsm["X_langcell"], atol=1e-6)


def test_a_view_of_a_backed_file_is_refused_before_it_is_read(
    model: Pretrained, cells: anndata.AnnData, tmp_path: Path
) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    view = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[:5]
    for use in (langcell.embed, langcell.annotate):
        with pytest.raises(InputError, match=r"a selection of a backed file.*adata\.to_memory"):
            use(view, model)
    langcell.annotate(view.to_memory(), model, TYPES, a=1, progress=False)


def test_texts_are_encoded_once(model: Pretrained, cells: anndata.AnnData) -> None:
    read = []
    hook = model.model.text_proj.register_forward_hook(lambda module, given, made: read.append(len(made)))
    try:
        langcell.annotate(cells, model, TYPES, top_k=2, chunk=3, progress=False)
    finally:
        hook.remove()
    assert sum(read) == len(TYPES), "once for four chunks"


def test_columns_of_others_are_not_overwritten(model: Pretrained, cells: anndata.AnnData) -> None:
    cells.obs["cell_id"] = cells.obs_names
    with pytest.raises(InputError, match=r"obs\['cell_id'\] would be overwritten"):
        langcell.annotate(cells, model, TYPES, a=1, key="cell")
    cells.uns["leiden"] = {"params": {"resolution": 1}}
    with pytest.raises(InputError, match=r"uns\['leiden'\] would be overwritten"):
        langcell.annotate(cells, model, TYPES, a=1, key="leiden")
    langcell.annotate(cells, model, TYPES, a=1, key="own", progress=False)
    langcell.annotate(cells, model, TYPES, a=1, key="own", progress=False)
    assert cells.obs["cell_id"].tolist() == cells.obs_names.tolist()


def test_few_of_the_models_genes_are_said(model: Pretrained, cells: anndata.AnnData) -> None:
    panel = cells[:, :70].copy()
    with pytest.warns(UserWarning, match=r"the file \(.*\) has 70 of the model's 765 genes: its sent"):
        langcell.annotate(panel, model, TYPES, a=1, progress=False)
    assert panel.uns["langcell"]["genes"] == 70
    assert "var_names" in panel.uns["langcell"]["naming"]


def test_a_sure_cell_is_rolled_up_to_its_own_type(model: Pretrained, cells: anndata.AnnData) -> None:
    """At the defaults, whose logits2 is nearly flat: a T cell of one of two kinds, and a sure B cell."""
    names = ["CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "B cell", "neuron"]
    annotator = Annotator(model, choose(model, names, ()), AnnotateOptions(roll_up=0.8))
    ct = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    p = torch.tensor([[0.9, 0.8, 0.01, 0.01], [0.02, 0.01, 0.95, 0.02]])
    belief = _belief(Scores(torch.zeros(2, 3), ct, p.softmax(1), p, p), a=0.1)
    np.testing.assert_allclose(belief.sum(1), 1, atol=1e-6)
    terms = [one.term for one in annotator.candidates]
    kind, sure = roll_up(belief, terms, model.ontology, 0.8).tolist()
    assert "CL:0000084" in model.ontology.ancestors(kind), "a kind of T cell"
    assert kind not in terms
    assert sure == "CL:0000236"


def test_a_second_call_leaves_nothing_of_the_first(model: Pretrained, cells: anndata.AnnData) -> None:
    cells.obs["cluster"] = "a"
    langcell.annotate(cells, model, TYPES, a=1, roll_up=0.5, cluster="cluster", progress=False)
    assert {"langcell_rolled_up", "langcell_majority"} <= set(cells.obs)
    langcell.annotate(cells, model, TYPES[:2], a=1, progress=False)
    assert not {"langcell_rolled_up", "langcell_majority"} & set(cells.obs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 5}, "a is 5; it must lie between 0 and 1"),
        ({"min_score": -0.1}, "min_score is -0.1"),
        ({"roll_up": 80}, "roll_up is 80"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_named(
    model: Pretrained, cells: anndata.AnnData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        langcell.annotate(cells, model, TYPES, **options)


def test_what_is_taken_at_its_word_is_said(model: Pretrained, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"taken at their word.*'natural killer cel'$"):
        choose(model, ["natural killer cel", "B cell"], ())
    with pytest.raises(InputError, match="'unassigned' is what cells without an answer"):
        choose(model, {"unassigned": "B cell", "NK": "natural killer cell"}, ())
    with pytest.raises(InputError, match="NK cannot be read"):  # one name is no list of candidates
        choose(model, "NK", ())
    with pytest.raises(InputError, match="None is no text"):
        choose(model, ["B cell", None], ())  # type: ignore[list-item]
    (tmp_path / "types.txt").write_text("B cell\nneuron\n")
    assert [one.label for one in choose(model, str(tmp_path / "types.txt"), ())] == ["B cell", "neuron"]


def test_clusters_vote_without_the_unassigned() -> None:
    label = pd.Series(["T", "T", "B", "unassigned", "B", "unassigned", "NK", "B"])
    cluster = pd.Series(["1", "1", "1", "1", "2", "3", None, "4"], dtype="category")
    assert majority(label, cluster).tolist() == ["T", "T", "T", "T", "B", "unassigned", "unassigned", "B"]
    tied = majority(pd.Series(["T", "B"]), pd.Series([1, 1]))
    assert tied.tolist() == ["B", "B"]


def test_a_mouse_file_is_refused_on_a_human_model(model: Pretrained, shared: Path) -> None:
    mouse = anndata.read_h5ad(shared / "mouse_val.h5ad")
    with pytest.raises(InputError, match=r"mus_musculus .*trained on homo_sapiens"):
        langcell.annotate(mouse, model, TYPES)
    assert "X_langcell" not in mouse.obsm


def test_a_column_that_is_not_there_is_named_before_anything_is_computed(
    model: Pretrained, cells: anndata.AnnData
) -> None:
    with pytest.raises(InputError, match="obs has no column leiden"):
        langcell.annotate(cells, model, TYPES, cluster="leiden")


def test_a_classifier_is_no_annotator(model: Pretrained, cells: anndata.AnnData) -> None:
    stated = {**model.config, "finetuned": {"kind": "classification", "target": "cell_type"}}
    drifted = Pretrained(**{**vars_of(model), "config": stated})
    with pytest.raises(InputError, match=r"fine-tuned for classification of cell_type.*langcell\.predict"):
        langcell.annotate(cells, drifted, TYPES)
    with pytest.raises(InputError, match="have left the space of the texts"):
        langcell.embed(cells, drifted)
    stated["finetuned"] = {"kind": "few_shot", "target": "cell_type"}
    langcell.annotate(cells, Pretrained(**{**vars_of(model), "config": stated}), TYPES, a=1)
    assert np.isnan(cells.obs["langcell_logits2"]).all()
    assert np.isfinite(cells.obs["langcell_score"]).all()


def test_the_library_loads_without_a_cluster(export: Path, tmp_path: Path) -> None:
    """Annotating imports neither ray, deepspeed nor tiledbsoma; importing langcell not even PyTorch."""
    program = f"""
import sys, langcell
assert "torch" not in sys.modules
from langcell.errors import InputError
import anndata, numpy as np, scipy.sparse as sp
model = langcell.Pretrained.from_pretrained({str(export)!r})
genes = model.vocabulary.gene_ids[:50]
a = anndata.AnnData(sp.csr_matrix(np.random.default_rng(0).poisson(2, (3, 50)).astype("float32")))
a.var_names = genes
langcell.annotate(a, model, ["B cell", "neuron"])
loaded = {{"ray", "deepspeed", "tiledbsoma", "cellxgene_census"}} & set(sys.modules)
assert not loaded, loaded
print(a.obs["langcell_label"].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
