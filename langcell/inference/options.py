"""Zero-shot annotation and its measure: the options of the inference room (standard library only)."""

from dataclasses import dataclass, field


@dataclass
class EvalOptions:
    """What is held out and how the five tables are made."""

    held_out_types: list[str] = field(default_factory=list)
    """Cell types (CL ids or labels) kept out of beta, of the texts and of training."""
    held_out_datasets: list[str] = field(default_factory=list)
    """Datasets (dataset_id) kept out of beta, of the texts and of training."""
    new_words: str | list[str] = "auto"
    """Coarser terms of the `new_words` tables: `auto` (from the ontology) or a list of CL ids."""
    top_k: int = 5
    """Candidates of a cell that the matching encoder scores (count)."""
    a: float = 0.1
    """Weight of the contrastive logits in `two_step`; 1 - a goes to the matching logits (0 to 1)."""
    max_cells: int = 4096
    """Most cells of one table (cells), a seeded sample of the split."""
    batch_tokens: int = 16384
    """Cell tokens of one evaluation batch (tokens)."""


@dataclass
class AnnotateOptions:
    """How candidates are scored, and when a cell is left unassigned."""

    top_k: int = 5
    """Candidates of a cell that the matching encoder scores (count). 1: contrast alone decides, as with `a` 1."""
    a: float = 0.1
    """Weight of the contrastive logits among these; 1 - a goes to the matching logits (0 to 1). 0.1: the released code; 0.5: their plain sum; 1: contrast alone decides, nothing is matched, which is faster by far (on a laptop hundreds of cells a second instead of five)."""
    min_score: float = 0.0
    """Score below which a cell is `unassigned` (0 to 1). Scores of the candidates sum to 1; with `a` 0.1 and `top_k` 5 the best one lies between 0.2 and 0.5."""
    roll_up: float | None = None
    """Share of the belief in all candidates that a term of the ontology must gather from those below it to be the rolled-up answer (0 to 1); the deepest such term is taken. The belief in a candidate is `a` of its contrast and 1 - `a` of its probability to match relative to the others', sharper than the score. None: no roll-up."""
    batch_tokens: int = 16384
    """Cell tokens, and text tokens of matched pairs, of one forward (tokens)."""
