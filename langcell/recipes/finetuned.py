"""What comes of a fine-tuning: its answers for the test cells, how good they are, and the model's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from langcell.files import whole_folder
from langcell.inference.candidates import Candidate
from langcell.inference.measures import Measures, multilabel_measures, regression_measures
from langcell.inference.options import AnnotateOptions
from langcell.inference.predict import JOINED, FineTuned, outputs
from langcell.inference.pretrained import Pretrained
from langcell.inference.scoring import zero_shot
from langcell.inference.tables import measures
from langcell.model.classifier import merge
from langcell.objective.few_shot import FewShot
from langcell.objective.supervised import Supervised
from langcell.recipes.card import tuned_card
from langcell.recipes.labelled import Study
from langcell.recipes.labels import Labels


def answers_of_classifier(
    module: Supervised, init: str, batch_tokens: int, model: Pretrained, study: Study
) -> tuple[FineTuned, pd.DataFrame]:
    """The fine-tuned LangCell-CE and its columns for the test cells.

    init: what its encoder started from; batch_tokens: cell tokens of one forward; model: it comes of.
    """
    made = merge(module.classifier).to(_device())
    head = replace(study.labels.head, source=f"{model.name} ({init})")
    cells, _ = study.part(study.split.test)
    return FineTuned.of(model, made, head), head.columns(outputs(made, cells, batch_tokens))


def answers_of_few_shot(
    module: FewShot, score: AnnotateOptions, model: Pretrained, study: Study, texts: list[Candidate]
) -> tuple[Pretrained, pd.DataFrame]:
    """The fine-tuned LangCell, and for the test cells which class's text it finds the truest, and its
    score."""
    fitted = module.model.to(_device()).eval()
    cells, _ = study.part(study.split.test)
    found = zero_shot(
        fitted,
        cells,
        module.texts,
        tau=model.tau,
        a=score.a,
        top_k=score.top_k,
        batch_tokens=score.batch_tokens,
    )
    assert found.two_step_NC is not None
    best = found.two_step_NC.max(1)
    name = study.labels.head.column
    label = pd.Categorical.from_codes(best.indices.numpy(), [one.label for one in texts])
    stated = {**model.config, "finetuned": {"target": study.labels.head.target, "kind": "few_shot"}}
    return (
        replace(model, model=fitted, config=stated),
        pd.DataFrame({name: label, f"{name}_score": best.values.numpy()}),
    )


def judge(study: Study, tested: pd.DataFrame) -> dict[str, Measures]:
    """Measures of the predictions for the test cells (`model`), and of the best `constant` that the training
    cells tell: the most frequent class, the mean, or the prevalence of each label."""
    head, split, value = study.labels.head, study.split, study.labels.value
    truth, learnt, column = value[split.test], value[split.train], tested[head.column]
    constant: np.ndarray
    score: Callable[[np.ndarray, np.ndarray], Any]
    if head.kind == "classification":
        score, predicted = measures, column.cat.codes.to_numpy(np.int64)
        constant = np.full(len(truth), np.bincount(learnt).argmax())
    elif head.kind == "regression":
        score, predicted = regression_measures, column.to_numpy()
        constant = np.full(len(truth), learnt.mean())
    else:
        score, predicted = multilabel_measures, tested.iloc[:, 1:].to_numpy()
        constant = np.broadcast_to(learnt.mean(0), predicted.shape)
    return {"model": score(truth, predicted), "constant": score(truth, constant)}


def as_stated(labels: Labels, rows: np.ndarray) -> Any:
    """The labels of some cells as the file has them."""
    value, classes = labels.value[rows], np.array(labels.head.classes, object)
    if labels.head.kind == "classification":
        return classes[value]
    return value if labels.head.kind == "regression" else [JOINED.join(classes[row > 0]) for row in value]


def save(
    found: FineTuned | Pretrained, directory: Path, summary: dict[str, Any], texts: list[Candidate]
) -> None:
    """Write the model, whole or not at all, with a card of its own; what stood there is replaced."""
    how = (
        f"{summary['method']} of {summary['target']} ({summary['kind']}), on {summary['split']['train']} "
        f"cells; {summary['split']['rule']}. On {summary['split']['test']} test cells: "
        f"{measured(summary['test']['model'])}; the best constant answer: "
        f"{measured(summary['test']['constant'])}."
    )
    if isinstance(found, FineTuned):
        found = replace(found, base=replace(found.base, card=tuned_card(found.base, how, classifies=True)))
    else:
        found = replace(found, card=tuned_card(found, how, classifies=False))
    with whole_folder(directory) as folder:
        found.save_pretrained(folder)
        if texts:
            lines = [f"{one.label}\t{one.term or one.text}\n" for one in texts]
            (folder / "candidates.tsv").write_text("".join(lines))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measured(found: Measures) -> str:
    """Measures as a person reads them."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items() if value is not None
    )
