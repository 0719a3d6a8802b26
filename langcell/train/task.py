"""What a worker is told of a stage, and what it tells in the end.

Ray Train's controller is handed both, and needs neither torch nor our model for it: importing them takes a
process 12 s on an old core, and every start of a stage waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from langcell.corpus.plan import Plan, Position
from langcell.train.trackers import Tracking

if TYPE_CHECKING:
    from langcell.corpus.options import CorpusOptions
    from langcell.model.langcell import LangCell
    from langcell.model.options import ModelOptions
    from langcell.objective.options import ObjectiveOptions
    from langcell.train.options import TrainOptions

OWNER = "owner"
"""File of the run directory that names who may write to it: a job, and the workers that it started last."""


@dataclass(frozen=True)
class StageTask:
    """All that a worker must know to run one stage."""

    stage: int
    name: str
    run_dir: str
    """Of the run: a folder that every node sees, or any URI that pyarrow knows."""
    plan: Plan
    val_plan: Plan | None
    first_step: int
    """Global step at which the stage begins."""
    vocab_size: int
    cell_length: int
    text_length: int
    short_share: float
    init: str | None
    """Checkpoint of the stage before to start from; None: the starting weights of `model`."""
    model: ModelOptions
    objective: ObjectiveOptions
    train: TrainOptions
    corpus: CorpusOptions
    evaluate: Callable[[LangCell], dict[str, Any]] | None
    """Zero-shot figures of a model in eval mode; called on every rank alike."""
    job: str = ""
    """Which job runs it (`rundir.take`); checkpoints are committed only while `OWNER` names it."""
    notice: Any = None
    """Handle of the actor that tells when to stop (`notice.make_notice`); None: nobody does."""
    tracking: Tracking = Tracking()
    """Trackers that its figures go to beside metrics.jsonl."""

    @property
    def epochs(self) -> int:
        return self.train.stage1_epochs if self.stage == 1 else self.train.stage2_epochs

    @property
    def lr(self) -> float:
        if self.stage == 1 and self.train.stage1_lr is not None:
            return self.train.stage1_lr
        return self.train.lr

    @property
    def last_step(self) -> int:
        """Global step after the stage's last."""
        return self.first_step + self.epochs * self.plan.steps

    def share_done(self, global_step: int) -> float:
        """Share of the steps of both stages that are trained after this one (0 to 1)."""
        return (global_step + 1) / (self.plan.steps * (self.train.stage1_epochs + self.train.stage2_epochs))

    def global_step(self, position: Position) -> int:
        return self.first_step + position.epoch * self.plan.steps + position.step

    def position(self, global_step: int) -> Position:
        """Where a global step of this stage stands; an epoch's end is the next one's start."""
        return Position(*divmod(global_step - self.first_step, self.plan.steps))


@dataclass(frozen=True)
class Outcome:
    """How a stage's workers ended by themselves.

    finished; stopped: on notice, its checkpoint committed; failed: for a reason that a restart would meet
    again, told in `message`.
    """

    status: Literal["finished", "stopped", "failed"]
    message: str = ""
