"""The methods that learn from labelled cells, each as a function of rows.

LangCell-CE, and the same head on a cell encoder that never read LangCell's corpus (Geneformer's weights, or
random ones), are fine-tuned alike, logistic regression sees the counts themselves, and prototypes are not
trained at all. A handful of cells makes a step an epoch, so few shots get more epochs, `shot_steps` steps at
least; both encoders of LangCell, whose step is a hundred times dearer, keep the released code's ten epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from langcell.batch import Packed
from langcell.inference import baseline
from langcell.inference.embed import tokenize
from langcell.inference.predict import outputs
from langcell.inference.pretrained import Pretrained
from langcell.inference.prototypes import nearest_prototype
from langcell.inference.scoring import zero_shot
from langcell.model.classifier import Kind, started
from langcell.model.langcell import LangCell
from langcell.recipes.benchmarks.data import Cohort
from langcell.recipes.benchmarks.few_shot import Predict
from langcell.recipes.options import EvaluateOptions
from langcell.train.fitting import fit_classifier, fit_few_shot
from langcell.train.options import FitOptions


@dataclass(frozen=True, eq=False)
class Methods:
    """Methods over one cohort. fit: options of every fine-tuning, whose seed is the method's."""

    asked: EvaluateOptions
    fit: FitOptions
    model: Pretrained
    cohort: Cohort

    def of_labels(self, class_N: np.ndarray) -> dict[str, Predict]:
        """Those that need labels alone. class_N: int64, class of each cell that is shown or asked."""
        other = "random_init" if self.asked.geneformer is None else "geneformer"
        return {
            "langcell_ce": self._classifier(class_N, lambda seed: self.model.model),
            other: self._classifier(class_N, self.exchanged),
            "logistic_regression": self._regression(class_N),
            "prototypes": self._prototypes(class_N),
        }

    def exchanged(self, seed: int) -> LangCell:
        """The model with a cell encoder that never read its corpus. Raises InputError where
        evaluate.geneformer does not fit."""
        return started(self.model.model, self.asked.geneformer or "random", seed, "evaluate.geneformer")

    def of_texts(self, class_N: np.ndarray, texts: Sequence[str]) -> dict[str, Predict]:
        """The full LangCell, which also reads the text of each class (by its number in class_N)."""
        return {"langcell": self._both_encoders(class_N, texts)}

    def multi_label(self, shown: np.ndarray, label_SL: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """LangCell-CE with a head of several labels: their probabilities for the rows asked, float32 [M, L].

        label_SL: bool, labels of the rows shown.
        """
        target = torch.from_numpy(label_SL.astype(np.float32))
        return (
            self._outputs(self.model.model, shown, target, asked, self.asked.seed, "multilabel")
            .sigmoid()
            .numpy()
        )

    def _outputs(
        self,
        start: LangCell,
        shown: np.ndarray,
        target: torch.Tensor,
        asked: np.ndarray,
        seed: int,
        kind: Kind = "classification",
    ) -> torch.Tensor:
        """Outputs for the rows asked of a classifier fine-tuned on the rows shown, float32 [M, O]."""
        steps = math.ceil(len(shown) / self.fit.batch)
        epochs = max(self.fit.epochs, math.ceil(self.asked.shot_steps / steps))
        made = fit_classifier(
            start,
            self._cells(shown),
            target,
            outputs=int(target.max()) + 1 if kind == "classification" else target.shape[1],
            kind=kind,
            options=replace(self.fit, seed=seed, epochs=epochs),
        )
        return outputs(made, self._cells(asked), self.asked.batch_tokens)

    def _classifier(self, class_N: np.ndarray, start: Callable[[int], LangCell]) -> Predict:
        def predict(shown: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
            classes, target = np.unique(class_N[shown], return_inverse=True)
            found = self._outputs(start(seed), shown, torch.from_numpy(target), asked, seed)
            return classes[found.argmax(1).numpy()]

        return predict

    def _both_encoders(self, class_N: np.ndarray, texts: Sequence[str]) -> Predict:
        def predict(shown: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
            classes, target = np.unique(class_N[shown], return_inverse=True)
            candidates = tokenize(
                self.model.tokenizer, [texts[c] for c in classes], self.model.text.max_length
            )
            fitted = fit_few_shot(
                self.model.model,
                self._cells(shown),
                torch.from_numpy(target),
                candidates,
                tau=self.model.tau,
                options=replace(self.fit, seed=seed),
            )
            scores = zero_shot(
                fitted,
                self._cells(asked),
                candidates,
                tau=self.model.tau,
                a=self.asked.a,
                top_k=self.asked.top_k,
                batch_tokens=self.asked.batch_tokens,
            )
            assert scores.two_step_NC is not None
            return classes[scores.two_step_NC.argmax(1).numpy()]

        return predict

    def _regression(self, class_N: np.ndarray) -> Predict:
        def predict(shown: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
            features = self.cohort.features_NG
            return baseline.predict(features[shown], class_N[shown], features[asked], seed)

        return predict

    def _prototypes(self, class_N: np.ndarray) -> Predict:
        def predict(shown: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
            z_NP = self.cohort.z_NP
            return nearest_prototype(z_NP[shown], class_N[shown], z_NP[asked])

        return predict

    def _cells(self, rows: np.ndarray) -> Packed:
        return self.cohort.packed.select(torch.from_numpy(rows))
