"""What a benchmark is run with: the options of the bench room (standard library only)."""

from dataclasses import dataclass, field
from typing import Literal


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


@dataclass
class StepOptions:
    """The training step, on micro-batches of a generated Census."""

    cells: int = 8_192
    """Cells of the generated Census (count); about 1.5 ms each to make, once."""
    seed: int = 0
    """Seed of the generated Census, the weights, the order and all draws (integer)."""
    micro_batch: int | None = None
    """Cells of a step (count). None: 6 on a CPU, where both kinds of step then take some 18 GB together, and 16 on a GPU, about 45 GB for the largest model."""
    repeats: int = 2
    """Steps of ours and of the baseline, by turns, on a CPU each on a micro-batch of its own (count); on a GPU rounds over all of them. The median is reported."""
    compared_cells: int = 4
    """Cells on which losses and gradients of both are compared, in float32 without dropout (count)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cpu`: 6 layers of 256 in float32. `cuda`: that, 12 of 512 and 12 of 896 (100M parameters) in bf16, with MFU and GPU memory."""
    dir: str = "runs/bench"
    """Folder of the generated Census (kept for the next time), of the corpus (removed) and of summary.json."""
    record: bool = False
    """Append the result to the records of this project (jobs/records/step.jsonl)."""


@dataclass
class ScaleOptions:
    """A step on more GPUs: measured bytes, and a model from them."""

    workers: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Workers at which a step's collectives are measured (counts); a line goes through those above 1, and the third tests it."""
    cells: int = 128
    """Cells of a GPU's micro-batch (count)."""
    mfu: float = 0.4
    """Share of an A100's bf16 peak that a step is assumed to reach (0 to 1)."""
    model_zero: Literal[1, 2, 3] = 2
    """ZeRO stage of the headline rows."""
    dir: str = "runs/bench"
    """Folder of what is written meanwhile (removed) and of summary.json."""
    record: bool = False
    """Append the result to the records of this project (jobs/records/scale.jsonl)."""


@dataclass
class ShuffleOptions:
    """How well the plan mixes cells, beside a full shuffle."""

    cells: int = 4_000_000
    """Cells of the generated Census, of which no more than obs is made (count); about half are train cells."""
    seed: int = 0
    """Seed of the generated Census, the plan and the full shuffle (integer)."""
    global_batch: list[int] = field(default_factory=lambda: [256, 1024])
    """Cells of a step (counts); the headline rows are of the first."""
    micro_batch: list[int] = field(default_factory=lambda: [32, 128])
    """Cells of a micro-batch, one for each global batch (counts)."""
    row_group_cells: list[int] = field(default_factory=lambda: [4096, 1024, 256, 128, 64])
    """Cells of a row group, measured beside the default of `corpus.row_group_cells` (counts)."""
    window_steps: list[int] = field(default_factory=lambda: [16, 64, 128])
    """Micro-batches of a window, measured beside the default of `corpus.window_steps` (counts)."""
    dir: str = "runs/bench"
    """Folder of summary.json."""
    record: bool = False
    """Append the result to the records of this project (jobs/records/shuffle.jsonl)."""


@dataclass
class AnnotateOptions:
    """Zero-shot annotation, beside the algorithm of LangCell's notebook."""

    cells: int = 32
    """Cells of a measurement, the same for both; of the lengths of a Census's (count). 32 are a batch of the notebook, which has a pass of g2 for each candidate."""
    candidates: int = 60
    """Candidate texts: cell types below `leukocyte` in the ontology, with their definitions (count)."""
    top_k: list[int] = field(default_factory=lambda: [5, 3])
    """Candidates of a cell that ours matches, one measurement each beside all of them (counts); the headline row is of the first."""
    max_length: int = 2048
    """Most tokens of a cell (tokens)."""
    seed: int = 0
    """Seed of the cells, the weights and the choice of candidates (integer)."""
    repeats: int = 2
    """Times that ours and the baseline are measured, by turns (count); the median is reported."""
    model: str | None = None
    """Export of a trained model of human cells, on which the agreement at each of `top_k` with all candidates matched is measured. None: no agreement is measured, for with random weights it says nothing."""
    trained_cells: int = 128
    """Cells of the demo that the trained model judges (count; 700 at most)."""
    dir: str = "runs/bench"
    """Folder of summary.json."""
    record: bool = False
    """Append the result to the records of this project (jobs/records/annotate.jsonl)."""
