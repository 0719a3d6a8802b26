"""The directory of a run: free or this run's own, and what it was told.

It is taken only when all checks have passed: a job that ends with a message leaves nothing behind, and
the corrected command finds the directory free.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from langcell.census.opening import resolve
from langcell.config import Config, to_yaml
from langcell.corpus.manifest import differences
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.storage import absolute

CONFIG = "config.yaml"
FREE = {
    "train": {
        "cpus_per_worker",
        "collective_timeout_s",
        "max_failures",
        "profile",
        "activation_checkpointing",
    },
    "corpus": {"prefetch"},
    "census": {"attempts", "tiledb", "dir", "bad_cells", "most_unreadable"},
}
"""Options that a run may be resumed with other values of: what it is given to run with, and how its cells are
fetched. (A corpus that left cells out says so itself.)"""


def with_absolute_paths(config: Config) -> Config:
    """The same with every local path absolute: workers have working directories of their own, and a stored
    config.yaml means the same from everywhere.

    Raises InputError for a run directory that is a URI, and for secrets among the options.
    """

    def found(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    def given(path: str | None) -> str | None:
        return path and absolute(path)

    model = config.model
    return replace(
        config,
        run=replace(config.run, dir=_local(config.run.dir)),
        census=resolve(config.census),
        beta=replace(config.beta, source=given(config.beta.source)),
        tokens=replace(config.tokens, vocabulary=given(config.tokens.vocabulary)),
        corpus=replace(config.corpus, dir=absolute(config.corpus.dir)),
        text=replace(config.text, ontologies=[found(path) for path in config.text.ontologies]),
        model=replace(
            model, text_init=found(model.text_init), cell_init=model.cell_init and found(model.cell_init)
        ),
    )


def _local(directory: str) -> str:
    if "://" in directory:
        raise InputError(
            f"run.dir: {directory} is a URI; this version writes runs to a folder that every node sees."
        )
    return str(Path(directory).absolute())


def check_free(config: Config) -> None:
    """Raises InputError where the directory holds a run and `--run.resume` is not given, or where it is
    given and there is none, or one of other settings."""
    stored = Path(config.run.dir) / CONFIG
    if not config.run.resume:
        if stored.exists():
            raise InputError(
                f"run.dir: {config.run.dir} holds a run already. Go on with it (--run.resume true), choose "
                "another (--run.dir DIR), or delete it."
            )
        return
    if not stored.exists():
        raise InputError(f"run.resume: {config.run.dir} holds no run to go on with ({CONFIG} is missing).")
    lines = differences(identity(yaml.safe_load(stored.read_text())), identity(asdict(config)))
    if lines:
        raise InputError(
            f"run.resume: the run in {config.run.dir} had other settings:\n  "
            + "\n  ".join(lines)
            + f"\nGo on with its own (--config {stored}), or start another (--run.dir DIR)."
        )


def store(config: Config) -> None:
    """Take the directory: write the resolved configuration into it, as `--config` reads it."""
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / CONFIG, to_yaml(replace(config, run=replace(config.run, resume=False))))


def identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run the run it is: not where it lives, nor how it is judged or supplied."""
    return {
        room: {key: value for key, value in values.items() if key not in FREE.get(room, set())}
        for room, values in options.items()
        if room not in ("run", "eval")
    }
