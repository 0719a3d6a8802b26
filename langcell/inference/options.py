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
