"""A fine-tuned LangCell-CE in use: labels, numbers or several labels for the cells of an AnnData.

Its folder is an export like any other, whose cell encoder is the fine-tuned one, with `head.safetensors` and
`head.json` beside it: cells become the sentences that the vocabulary and medians of the export make of them.
A cell without a gene of the vocabulary gets no prediction.

Shape suffixes: N cells, B cells of a batch, W hidden width, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors.torch import save_file
from torch import Tensor

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.annotate import COLUMNS, counts_of, refuse_backed_view
from langcell.inference.embed import batches, inferring
from langcell.inference.pretrained import Pretrained
from langcell.model.classifier import CellClassifier, Kind, with_cells
from langcell.model.weights import load_into, read_tensors

JOINED = "||"
"""Between the labels of a cell that has several."""
WEIGHTS, STATED = "head.safetensors", "head.json"


@dataclass(frozen=True)
class Head:
    """head.json. target: what is predicted, as its columns are called; classes: of the outputs (none in a
    regression); mean, std: of the training cells' values, in the target's own unit; source: what was
    fine-tuned."""

    target: str
    kind: Kind
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    source: str = ""

    @property
    def outputs(self) -> int:
        """O."""
        return len(self.classes) or 1

    @property
    def column(self) -> str:
        """What predictions are called: `langcell_TARGET`, or `langcell_predicted_TARGET` where an annotation
        has a column of that name."""
        return f"langcell_{'predicted_' * (self.target in COLUMNS)}{self.target}"

    def columns(self, output_NO: Tensor) -> pd.DataFrame:
        """Predictions from outputs, without an index of their own.

        classification: `column` (category) and its probability. regression: `column` in the target's unit.
        multilabel: `column`, labels of probability 0.5 and more, joined by `||`, and the probability of each
        label.
        """
        name = self.column
        if self.kind == "regression":
            return pd.DataFrame({name: output_NO[:, 0].double().numpy() * self.std + self.mean})
        if self.kind == "classification":
            best = output_NO.softmax(1).max(1)
            label = pd.Categorical.from_codes(best.indices.numpy(), list(self.classes))
            return pd.DataFrame({name: label, f"{name}_probability": best.values.numpy()})
        p_NO = output_NO.sigmoid().numpy()
        held = np.array(self.classes, object)
        joined = [JOINED.join(held[row]) for row in p_NO >= 0.5]
        each = {f"{name}_{label}_probability": p_NO[:, i] for i, label in enumerate(self.classes)}
        return pd.DataFrame({name: joined, **each})


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model: the export around its encoder, the classifier and what its outputs mean."""

    base: Pretrained
    classifier: CellClassifier
    head: Head

    @classmethod
    def of(cls, base: Pretrained, classifier: CellClassifier, head: Head) -> FineTuned:
        """From a merged classifier and the model that it was fine-tuned from."""
        stated = {**base.config, "finetuned": {"target": head.target, "kind": head.kind}}
        model = with_cells(base.model, classifier.cell_bert)  # type: ignore[arg-type]
        return cls(replace(base, model=model, config=stated), classifier, head)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | None = None) -> FineTuned:
        """What `save_pretrained` wrote. Raises InputError where the folder is no whole one."""
        directory = Path(directory)
        base = Pretrained.from_pretrained(directory, device)
        try:
            stated = json.loads((directory / STATED).read_text())
            head = Head(**{**stated, "classes": tuple(stated["classes"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory} holds no fine-tuned head ({STATED}: {error}); make one with jobs/finetune.py"
            ) from error
        classifier = CellClassifier(base.model.cell_bert, head.outputs)
        load_into(classifier.head, read_tensors(directory / WEIGHTS), str(directory / WEIGHTS))
        return cls(base, classifier.to(base.device).eval(), head)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write everything into `directory`, as `from_pretrained` reads it."""
        self.base.save_pretrained(directory)
        weights = {name: tensor.detach().cpu() for name, tensor in self.classifier.head.state_dict().items()}
        save_file(weights, Path(directory) / WEIGHTS)
        (Path(directory) / STATED).write_text(json.dumps(asdict(self.head), indent=2))


def predict(
    adata: AnnData,
    model: FineTuned | str | Path,
    *,
    layer: str | None = None,
    symbols: Mapping[str, str] | None = None,
    chunk: int = 4096,
    batch_tokens: int = 16384,
) -> pd.DataFrame:
    """Predictions of all cells, in obs and as a table with obs's index (columns: `Head.columns`).

    adata: raw counts, in memory or backed; layer, symbols as of `langcell.annotate`; chunk: cells read at a
    time; batch_tokens: cell tokens of one forward. Raises InputError for what cannot be read.
    """
    refuse_backed_view(adata)
    model = model if isinstance(model, FineTuned) else FineTuned.from_pretrained(model)
    counts = counts_of(adata, model.base, layer, symbols)
    parts = [outputs(model.classifier, cells, batch_tokens) for _, cells in counts.chunks(chunk)]
    table = model.head.columns(torch.cat(parts))
    for name in table:
        table[name] = table[name].mask(counts.empty_N)
    table.index = adata.obs.index
    for name in table:
        adata.obs[name] = table[name]
    return table


def outputs(classifier: CellClassifier, cells: Packed, batch_tokens: int) -> Tensor:
    """Outputs of every cell [N, O], float32 on the CPU."""
    return _each(classifier, cells, batch_tokens, classifier)


def states(classifier: CellClassifier, cells: Packed, batch_tokens: int) -> Tensor:
    """State of `<cls>` of every cell [N, W], float32 on the CPU: what a frozen encoder makes of them."""
    return _each(classifier, cells, batch_tokens, classifier.states)


def _each(classifier: CellClassifier, cells: Packed, batch_tokens: int, function: Any) -> Tensor:
    with inferring(classifier) as device:  # type: ignore[arg-type]  # any module
        parts = [function(batch.to(device)).float().cpu() for _, batch in batches(cells, batch_tokens)]
    return torch.cat(parts)
