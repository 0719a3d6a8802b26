"""Token blocks on storage, their splits and their order: the options of the corpus room (standard library only)."""

from dataclasses import dataclass


@dataclass
class CorpusOptions:
    """Where the corpus lives, how it is split and in what order it is read."""

    dir: str = "runs/corpus"
    """Folder (or any pyarrow filesystem URI) of the corpus; prepared there if absent, refused if it holds another one."""
    split_by: str = "auto"
    """What is kept together in one split: `dataset`, `donor`, `cell`, or `auto` (the first of these that the corpus has several of)."""
    test_share: float = 0.1
    """Share of the datasets, donors or cells (of each type) that is kept for testing (0 to 1)."""
    val_share: float = 0.02
    """Share kept for validation: its losses choose the best checkpoint (0 to 1; 0: the last is the best)."""
    split_seed: int = 0
    """Seed of the split (integer)."""
    row_group_cells: int = 128
    """Cells of a Parquet row group, the unit in which an epoch is shuffled (cells); fewer mix better: with 4096, and 16 `window_steps`, a batch of 256 sees 2 datasets instead of 49."""
    window_steps: int = 128
    """M: micro-batches that a lane shuffles and packs together (micro-batches); more mix better and take memory, 11 MB a lane for 32 cells each."""
    prefetch: int = 4
    """Steps whose micro-batches a worker's stream holds ready (steps)."""
