"""What fine-tuning of LangCell-CE minimises: a loss per cell, for three kinds of target.

    classification   cross-entropy over the classes
    regression       squared error of the standardised value
    multilabel       binary cross-entropy, the mean over the labels

The module returns a weighted sum over its cells and nothing of the rest of the batch, so that the cells of a
step may be dealt to any number of workers and micro-batches: the caller divides by their global count.

Shape suffixes: B cells, O outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from langcell.batch import Packed
from langcell.model.classifier import CellClassifier, Kind


class Supervised(nn.Module):
    """A classifier and its loss."""

    extra_tokens = 0
    """Tokens that each cell costs beside its own."""

    def __init__(self, classifier: CellClassifier, kind: Kind) -> None:
        super().__init__()
        self.classifier, self.kind = classifier, kind

    def forward(self, cells: Packed | Tensor, target: Tensor, weight_B: Tensor) -> Tensor:
        """Sum over the cells of weight times loss (float32 scalar).

        cells: sentences or states (`CellClassifier`). target: int64 [B], index of the class; float32 [B]
        standardised; or float32 [B, O] of 0 and 1.
        """
        return (supervised_loss(self.classifier(cells), target, self.kind) * weight_B).sum()


def supervised_loss(output_BO: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Loss of each cell [B]."""
    if kind == "classification":
        return F.cross_entropy(output_BO, target, reduction="none")
    if kind == "regression":
        return F.mse_loss(output_BO.squeeze(1), target, reduction="none")
    return F.binary_cross_entropy_with_logits(output_BO, target, reduction="none").mean(dim=1)
