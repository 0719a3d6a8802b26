"""Where a run lives: the options of the recipes room (standard library only)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RunOptions:
    """One run."""

    dir: str = "runs/pretrain"
    """Where the run lives: config.yaml, metrics.jsonl, trace/, checkpoints/, export/, report/, summary.json. A folder that every node sees, or any URI that pyarrow knows (s3://, gs://)."""
    name: str | None = None
    """Name of the run in its metrics, report and model card. None: the last part of `dir`."""
    resume: bool | Literal["auto"] = False
    """`true`: go on from the newest whole checkpoint in `dir`; `false`: a folder that holds a run is refused; `auto`: go on where there is a run, else start one, so that the same command can be submitted again and again."""
    seeds: int = 3
    """Runs of jobs/seeds.py (count), with the seeds train.seed, train.seed + 1, ..."""
    ray_address: str | None = None
    """Ray cluster to join: `auto` or host:port. None: the one named by RAY_ADDRESS, else one is started here."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = field(default_factory=list)
    """What the figures of metrics.jsonl go to as well: `tensorboard` (event files in `dir`), `mlflow`, `wandb` (both as their environment variables say). The packages of the last two are yours to install."""


@dataclass
class PlaceOptions:
    """Where a job leaves what it makes, and the cluster it runs on."""

    dir: str = "runs/job"
    """Folder of what the job makes, summary.json among it."""
    ray_address: str | None = None
    """Ray cluster to join: `auto` or host:port. None: the one named by RAY_ADDRESS, else one is started here."""


@dataclass
class AblationOptions:
    """Which parts of the objective are left out or exchanged, one at a time."""

    variants: list[str] = field(
        default_factory=lambda: [
            "all",
            "no_mgm",
            "no_cc",
            "no_ct",
            "no_ctm",
            "paper",
            "mgm_view",
            "ctm_mining",
        ]
    )
    """Runs that are compared: `all` four losses as configured, each loss left out, the published objective (`paper`), and the other value of `objective.mgm_view` and `objective.ctm_mining`."""
    concurrent: int = 1
    """Runs that train at the same time (count)."""
