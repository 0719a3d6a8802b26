"""Steps that must not move the weights: a loss that is no number, a gradient that is none or explodes.

One bad batch of weeks must not end a run, nor poison it: its update is left out, counted, and its cells are
written down. Many in a row are no accident, and the run ends, to be looked at. The losses of all ranks are
known before the update and the norm is of the whole gradient, so every rank decides alike without asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from deepspeed import DeepSpeedEngine


class Guard:
    """engine: built by `build_engine`; limit: norm before clipping beyond which a step is left out (0: only
    one that is no number); skipped, in_row: counts to go on from."""

    def __init__(self, engine: DeepSpeedEngine, limit: float, skipped: int, in_row: int) -> None:
        self.skipped, self.in_row = skipped, in_row
        self.skips = False
        """Whether the last step was left out."""
        self._engine, self._limit = engine, limit or math.inf
        self._finite = True
        engine.optimizer.optimizer.allowed = self._allowed

    def judge(self, losses: Iterable[float]) -> None:
        """Before the update: the step's losses over the global batch."""
        self._finite = all(math.isfinite(loss) for loss in losses)

    def _allowed(self) -> bool:
        norm = float(self._engine.optimizer._global_grad_norm)
        return self._finite and math.isfinite(norm) and 0 <= norm <= self._limit

    def count(self) -> None:
        """After the update, or its absence."""
        overflow = bool(self._engine.optimizer.overflow)
        if overflow:
            # DeepSpeed left the step out by itself, and the schedule with it: the rate is a function of the
            # step.
            self._engine.lr_scheduler.step()
        self.skips = overflow or not self._allowed()
        self.skipped += self.skips
        self.in_row = self.in_row + 1 if self.skips else 0
