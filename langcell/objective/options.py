"""The four losses: the options of the objective room (standard library only)."""

from dataclasses import dataclass
from typing import Literal

TAU_RANGE = (0.01, 0.5)
"""Where a learnt temperature is kept: CLIP's own floor; above 0.5 cosines no longer separate anything."""


@dataclass
class ObjectiveOptions:
    """What is minimised."""

    preset: Literal["langcell", "paper"] = "langcell"
    """`langcell`: cells of one text share positives and ontology-related texts are no negatives. `paper`: the published objective, where each cell's own text is its only positive."""
    mask_ratio: float = 0.15
    """Share of a cell's genes chosen for masked gene modelling (0 to 1)."""
    mgm_view: Literal["own", "shared"] = "own"
    """`own`: MGM has its own masked pass (three cell passes). `shared`: the masked pass is also the second view of C-C (two passes; a deviation from the paper)."""
    tau: float = 0.05
    """Temperature of the contrastive logits (positive number); the start value where it is learnt."""
    tau_learnt: bool = False
    """Whether the temperature is a parameter."""
    w_mgm: float = 1.0
    """Weight of masked gene modelling."""
    w_cc: float = 1.0
    """Weight of cell-cell contrast."""
    w_ct: float = 1.0
    """Weight of cell-text contrast."""
    w_ctm: float = 1.0
    """Weight of cell-text matching."""
    mgm_chunk: int = 4096
    """Masked genes whose logits over the vocabulary are held at a time (genes)."""
    logit_rows: int | None = None
    """Rows of a rank whose contrastive logits are held at a time (cells), the others computed again in the backward. None: all of them."""
    ctm_mining: Literal["exact", "balanced"] = "exact"
    """`exact`: a hard text for each cell and a hard cell for each text. `balanced`: a second hard text instead of the hard cell, in proportion to exp(score) over all the text could match, so that every rank has equally many pairs (a deviation)."""
    ctm_cells: int | None = None
    """Cells of a lane's micro-batch that take part in matching (cells), a seeded choice. None: all."""
