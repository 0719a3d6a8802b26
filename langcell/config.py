"""One tree of options for every job: the rooms' dataclasses joined, read by jsonargparse.

The order of precedence is the usual one: defaults of the dataclasses, then `--config FILE.yaml`,
then dotted overrides (`--train.num_workers 4`). An unknown key, a wrong type or a value out of
range is an error with the key's name before anything starts. `--help` shows every field with the
text that stands below it in its `options.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from langcell.cells.options import BetaOptions, TokenOptions
from langcell.census.options import CensusOptions
from langcell.corpus.options import CorpusOptions
from langcell.errors import InputError
from langcell.inference.options import EvalOptions
from langcell.model.options import ModelOptions
from langcell.objective.options import ObjectiveOptions
from langcell.recipes.options import RunOptions
from langcell.text.options import TextOptions
from langcell.train.options import TrainOptions


@dataclass
class Config:
    """Everything a job can be told."""

    run: RunOptions = field(default_factory=RunOptions)
    census: CensusOptions = field(default_factory=CensusOptions)
    beta: BetaOptions = field(default_factory=BetaOptions)
    tokens: TokenOptions = field(default_factory=TokenOptions)
    text: TextOptions = field(default_factory=TextOptions)
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)


def parse(description: str, default: Path, argv: Sequence[str] | None = None) -> Config:
    """The configuration of a job from its command line.

    default: the preset that is read where no `--config` is given. Raises InputError on a key or a
    value that is wrong.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        description=description, default_env=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help=f"YAML preset; overrides follow it. Default: {default.name}"
    )
    for room in dataclasses.fields(Config):
        parser.add_class_arguments(room.default_factory, room.name)  # type: ignore[arg-type]
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", str(default), *argv]
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        raise InputError(f"configuration: {error} (every key: --help)") from error
    config = Config(
        **{
            room.name: room.default_factory(**vars(values[room.name]))  # type: ignore[operator, misc]
            for room in dataclasses.fields(Config)
        }
    )
    validate(config)
    return config


def validate(config: Config) -> None:
    """Check what a type cannot say. Raises InputError naming the key, its value and what it may be."""
    train = config.train
    if train.global_batch % train.micro_batch:
        raise InputError(
            f"--train.global_batch ({train.global_batch}) must be a multiple of --train.micro_batch "
            f"({train.micro_batch})."
        )
    lanes = train.global_batch // train.micro_batch
    if lanes != train.num_workers:
        raise InputError(
            f"--train.global_batch {train.global_batch} / --train.micro_batch {train.micro_batch} makes "
            f"{lanes} lanes for {train.num_workers} workers. One lane a worker is what this version "
            "trains (several lanes a worker, accumulation with a global contrastive batch, come later): "
            f"set --train.num_workers {lanes}, or --train.micro_batch "
            f"{train.global_batch // train.num_workers}."
        )
    shares = {
        "objective.mask_ratio": config.objective.mask_ratio,
        "text.short_share": config.text.short_share,
        "corpus.test_share": config.corpus.test_share,
        "corpus.val_share": config.corpus.val_share,
        "eval.a": config.eval.a,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"--{key} is {share}; it is a share, from 0 to 1.")


def to_yaml(config: Config) -> str:
    """The resolved configuration, readable by `--config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
