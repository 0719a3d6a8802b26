"""What a benchmark is run with: the options of the bench room (standard library only)."""

from dataclasses import dataclass, field


@dataclass
class DataOptions:
    """The data road, on a generated Census."""

    cells: int = 51_200
    """Cells of the generated Census (count); about 1.5 ms each to make, once, and 2.7 kB on disk."""
    seed: int = 0
    """Seed of the generated Census (integer)."""
    baseline_cells: int = 4_096
    """The first cells, which the loops of others are given too, some of them slow (count; rounded up to whole slices)."""
    cpus: list[int] = field(default_factory=lambda: [1, 2])
    """CPUs that the read and the passes are given, one measurement each (counts); the processes are bound to so many."""
    repeats: int = 3
    """Times that each figure is measured (count); the median is reported."""
    dir: str = "runs/bench"
    """Folder of the generated Census (kept for the next time), of what is written meanwhile (removed) and of summary.json."""
    record: bool = False
    """Append the result to the records of this project (jobs/records/data.jsonl)."""
