"""How good predicted numbers and sets of labels are, each beside the best that knows no cell.

Shape suffixes: N cells, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

Measures = Mapping[str, float | None]


def regression_measures(truth_N: np.ndarray, predicted_N: np.ndarray) -> Measures:
    """Mean absolute and root mean squared error (in the target's unit), R2 and Pearson's r; the last two are
    None where they are not defined (fewer than two cells, or a constant)."""
    varies = len(truth_N) > 1 and np.ptp(truth_N) > 0
    both_vary = varies and np.ptp(predicted_N) > 0
    return {
        "mae": float(mean_absolute_error(truth_N, predicted_N)),
        "rmse": float(root_mean_squared_error(truth_N, predicted_N)),
        "r2": float(r2_score(truth_N, predicted_N)) if varies else None,
        "pearson": float(np.corrcoef(truth_N, predicted_N)[0, 1]) if both_vary else None,
    }


def multilabel_measures(truth_NL: np.ndarray, p_NL: np.ndarray) -> Measures:
    """Macro and micro F1 (at probability 0.5), mean average precision and mean AUROC.

    F1 is that of having a label, also where there is one alone, of which scikit-learn makes two classes. The
    last two are over the labels that some of these cells have and others have not; None where there is no
    such label.
    """
    answer_NL = p_NL >= 0.5
    mixed = np.flatnonzero((truth_NL.min(0) == 0) & (truth_NL.max(0) == 1))

    f1_L = [f1_score(truth_NL[:, i], answer_NL[:, i], zero_division=0) for i in range(truth_NL.shape[1])]

    def mean(score: object) -> float | None:
        each = [score(truth_NL[:, i], p_NL[:, i]) for i in mixed]  # type: ignore[operator]
        return float(np.mean(each)) if each else None

    return {
        "macro_f1": float(np.mean(f1_L)),
        "micro_f1": float(f1_score(truth_NL.ravel(), answer_NL.ravel(), zero_division=0)),
        "average_precision": mean(average_precision_score),
        "auroc": mean(roc_auc_score),
    }
