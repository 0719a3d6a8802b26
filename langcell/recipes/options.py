"""Where a run lives: the options of the recipes room (standard library only)."""

from dataclasses import dataclass


@dataclass
class RunOptions:
    """One run."""

    dir: str = "runs/pretrain"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, export/, report/, summary.json."""
    name: str | None = None
    """Name of the run in its metrics, report and model card. None: the last part of `dir`."""
    resume: bool = False
    """Go on from the last checkpoint in `dir`; without it a folder that holds a run is refused."""
    seeds: int = 3
    """Runs of jobs/seeds.py (count), with the seeds train.seed, train.seed + 1, ..."""
    ray_address: str | None = None
    """Ray cluster to join: `auto` or host:port. None: the one named by RAY_ADDRESS, else one is started here."""
