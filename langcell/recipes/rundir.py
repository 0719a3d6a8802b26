"""The directory of a run: free or this run's own, and what it was told.

It is taken only when all checks have passed: a job that ends with a message leaves nothing behind, and
the corrected command finds the directory free. `owner` names the job that the run belongs to now: one that
was thought lost, and lives, finds another's name there and commits nothing any more.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from langcell.census.opening import resolve
from langcell.config import Config, to_yaml
from langcell.corpus.manifest import differences
from langcell.errors import InputError
from langcell.storage import absolute, open_root, read_file, write_file
from langcell.train.task import OWNER

CONFIG = "config.yaml"
FREE = {
    "train": {
        "cpus_per_worker",
        "collective_timeout_s",
        "max_failures",
        "profile",
        "activation_checkpointing",
        "num_workers",
        "min_workers",
        "resize_s",
        "worker_resources",
        "gpus",
        "accelerator",
        "zero",
        "offload",
        "checkpoint_epochs",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_last",
        "keep_epoch_ends",
        "max_skipped",
        "deterministic",
    },
    "corpus": {"prefetch"},
    "census": {"attempts", "tiledb", "dir", "bad_cells", "most_unreadable"},
}
"""Options that a run may be resumed with other values of: what it is given to run with, and how its cells are
fetched. (A corpus that left cells out says so itself.)"""


def with_absolute_paths(config: Config) -> Config:
    """The same with every local path absolute: workers have working directories of their own, and a stored
    config.yaml means the same from everywhere.

    Raises InputError for secrets among the options.
    """

    def found(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    def given(path: str | None) -> str | None:
        return path and absolute(path)

    model = config.model
    return replace(
        config,
        run=replace(config.run, dir=absolute(config.run.dir)),
        census=resolve(config.census),
        beta=replace(config.beta, source=given(config.beta.source)),
        tokens=replace(config.tokens, vocabulary=given(config.tokens.vocabulary)),
        corpus=replace(config.corpus, dir=absolute(config.corpus.dir)),
        text=replace(config.text, ontologies=[found(path) for path in config.text.ontologies]),
        model=replace(
            model, text_init=found(model.text_init), cell_init=model.cell_init and found(model.cell_init)
        ),
    )


def run_name(config: Config) -> str:
    """What the run is called: as told, else the last part of its directory."""
    return config.run.name or config.run.dir.partition("?")[0].rstrip("/").rpartition("/")[2]


def place_in(config: Config, name: str) -> str:
    """Where `name` of the run directory lies, as a user would name it."""
    place, mark, query = config.run.dir.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def run_root(config: Config) -> fs.FileSystem:
    """The filesystem whose root is the run directory. Raises InputError."""
    return open_root(config.run.dir, "run.dir")


def check_free(config: Config) -> bool:
    """Whether the directory holds a run to go on with. Raises InputError where it holds one and
    `--run.resume` is not given, or where it must hold one and does not, or one of other settings."""
    try:
        stored = read_file(run_root(config), CONFIG)
    except FileNotFoundError:
        if config.run.resume is True:
            raise InputError(
                f"run.resume: {config.run.dir} holds no run to go on with ({CONFIG} is missing)."
            ) from None
        return False
    if not config.run.resume:
        raise InputError(
            f"run.dir: {config.run.dir} holds a run already. Go on with it (--run.resume true), choose "
            "another (--run.dir DIR), or delete it."
        )
    lines = differences(identity(yaml.safe_load(stored)), identity(asdict(config)))
    if lines:
        raise InputError(
            f"run.resume: the run in {config.run.dir} had other settings:\n  "
            + "\n  ".join(lines)
            + f"\nGo on with its own (--config {config.run.dir}/{CONFIG}), or start another (--run.dir DIR)."
        )
    return True


def take(config: Config) -> str:
    """Take the directory: write the resolved configuration into it, as `--config` reads it, and the name of
    this job, which is returned."""
    root, job = run_root(config), uuid.uuid4().hex
    root.create_dir("checkpoints", recursive=True)
    resolved = replace(config, run=replace(config.run, resume=False))
    write_file(root, CONFIG, to_yaml(resolved).encode())
    write_file(root, OWNER, job.encode())
    return job


@contextmanager
def outputs(config: Config) -> Iterator[Path]:
    """A local folder for what the run makes in the end (export, report): the run directory itself, or one
    whose content is uploaded to it at the end of the block."""
    if "://" not in config.run.dir:
        yield Path(config.run.dir)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)
        fs.copy_files(directory, "", destination_filesystem=run_root(config))


def identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run the run it is: not where it lives, nor how it is judged, written out or
    supplied."""
    return {
        room: {key: value for key, value in values.items() if key not in FREE.get(room, set())}
        for room, values in options.items()
        if room not in ("run", "eval", "export")
    }
