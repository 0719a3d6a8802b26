"""What is fine-tuned, from a model and labelled cells; and fine-tuning in this process.

A call here is the worker's loop as a world of one, with no cluster and nothing written: for few-shot
curves, which run dozens of fits of some seconds. jobs/finetune.py hands the same tasks to Ray Train.

Shape suffixes: N cells, O outputs, C classes.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor

from langcell.batch import Packed
from langcell.inference.predict import states
from langcell.model.classifier import CellClassifier, Kind, Mode, classifier, merge
from langcell.model.langcell import LangCell
from langcell.objective.few_shot import FewShot
from langcell.objective.supervised import Supervised
from langcell.train.finetune import Examples, Task, fit
from langcell.train.options import FitOptions

RATES: dict[Literal["full", "frozen", "lora", "few_shot"], float] = {
    "full": 5e-5,
    "frozen": 0.0,  # but the head's own
    "lora": 5e-4,
    "few_shot": 1e-5,
}
"""Peak learning rates where none is given (per step): of Geneformer's and LangCell-CE's fine-tuning, of
peft's examples, and of LangCell's few-shot code."""


def classifier_task(
    model: LangCell,
    train: tuple[Packed, Tensor],
    val: tuple[Packed, Tensor] | None = None,
    *,
    kind: Kind,
    outputs: int,
    mode: Mode,
    lora_rank: int,
    options: FitOptions,
) -> Task:
    """LangCell-CE over a copy of the model's cell encoder.

    train, val: sentences and targets (as of `Supervised`); mode, lora_rank: as of `classifier`.
    """
    made = classifier(model.cell_bert, outputs, mode, lora_rank=lora_rank, seed=options.seed)

    def examples(cells: Packed, target: Tensor) -> Examples:
        frozen = mode == "frozen" and len(target)
        return Examples(states(made, cells, options.batch_tokens) if frozen else cells, target)

    val = val or (Packed.from_sequences([]), train[1][:0])
    lr = RATES[mode] if options.lr is None else options.lr
    return Task(Supervised(made, kind), examples(*train), examples(*val), lr, options)


def few_shot_task(
    model: LangCell,
    train: tuple[Packed, Tensor],
    texts: Packed,
    val: tuple[Packed, Tensor] | None = None,
    *,
    tau: float,
    options: FitOptions,
) -> Task:
    """Both encoders of a copy of the model.

    train, val: sentences and classes (int64 [N]); texts: of the C classes; tau: temperature of the contrast.
    """
    module = FewShot(copy.deepcopy(model), texts, tau)
    val = val or (Packed.from_sequences([]), train[1][:0])
    lr = RATES["few_shot"] if options.lr is None else options.lr
    return Task(module, Examples(*train), Examples(*val), lr, options)


def fit_classifier(
    model: LangCell,
    cells: Packed,
    target: Tensor,
    *,
    outputs: int,
    kind: Kind = "classification",
    mode: Mode = "full",
    lora_rank: int = 8,
    options: FitOptions | None = None,
    val: tuple[Packed, Tensor] | None = None,
) -> CellClassifier:
    """A LangCell-CE fine-tuned in this process, on the model's device; merged, in evaluation mode.

    model: left as it is (`started` exchanges what it starts from). target: int64 [N] classes below `outputs`;
    float32 [N], standardised; or float32 [N, O] of 0 and 1. With `val` the best epoch by its loss is kept.
    """
    task = classifier_task(
        model,
        (cells, target),
        val,
        kind=kind,
        outputs=outputs,
        mode=mode,
        lora_rank=lora_rank,
        options=options or FitOptions(),
    )
    fit(task, next(model.parameters()).device)
    assert isinstance(task.module, Supervised)
    return merge(task.module.classifier)


def fit_few_shot(
    model: LangCell,
    cells: Packed,
    class_N: Tensor,
    texts: Packed,
    *,
    tau: float,
    options: FitOptions | None = None,
    val: tuple[Packed, Tensor] | None = None,
) -> LangCell:
    """Both encoders fine-tuned in this process, on the model's device; in evaluation mode.

    model: left as it is. class_N: int64, row of each cell's own text among the C `texts`.
    """
    task = few_shot_task(model, (cells, class_N), texts, val, tau=tau, options=options or FitOptions())
    fit(task, next(model.parameters()).device)
    assert isinstance(task.module, FewShot)
    return task.module.model
