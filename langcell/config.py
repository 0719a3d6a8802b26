"""One tree of options for every job: the rooms' dataclasses joined, read by jsonargparse.

Options are plain dataclasses in files of their own, so that a tree is known, shown and checked in under a
second, before any recipe is loaded.

The order of precedence is the usual one: defaults of the dataclasses, then `--config FILE.yaml`,
then dotted overrides (`--train.num_workers 4`). An unknown key, a wrong type or a value out of
range is an error with the key's name before anything starts. `--help` shows every field with the
text that stands below it in its `options.py`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from langcell.cells.options import BetaOptions, TokenOptions
from langcell.census.options import CensusOptions
from langcell.corpus.options import CorpusOptions
from langcell.errors import InputError, refuse_secrets
from langcell.inference.options import AnnotateOptions, EvalOptions
from langcell.model.options import ModelOptions
from langcell.objective.options import TAU_RANGE, ObjectiveOptions
from langcell.recipes.options import (
    AblationOptions,
    AnnotateJobOptions,
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    PlaceOptions,
    RunOptions,
)
from langcell.text.options import TextOptions
from langcell.train.options import FitOptions, TrainOptions


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
    export: ExportOptions = field(default_factory=ExportOptions)


@dataclass
class AnnotateConfig:
    """Everything jobs/annotate.py can be told."""

    run: PlaceOptions = field(default_factory=PlaceOptions)
    annotate: AnnotateJobOptions = field(default_factory=AnnotateJobOptions)
    score: AnnotateOptions = field(default_factory=AnnotateOptions)
    census: CensusOptions = field(default_factory=CensusOptions)


@dataclass
class FinetuneConfig:
    """Everything jobs/finetune.py can be told."""

    run: PlaceOptions = field(default_factory=PlaceOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    fit: FitOptions = field(default_factory=FitOptions)
    score: AnnotateOptions = field(default_factory=AnnotateOptions)


@dataclass
class EvaluateConfig:
    """Everything jobs/evaluate.py can be told."""

    run: PlaceOptions = field(default_factory=PlaceOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    fit: FitOptions = field(default_factory=FitOptions)


@dataclass
class ConvertConfig:
    """Everything jobs/convert.py can be told."""

    run: PlaceOptions = field(default_factory=PlaceOptions)
    convert: ConvertOptions = field(default_factory=ConvertOptions)


@dataclass
class AblationConfig(Config):
    """The main job's options, and which of its parts are varied."""

    ablation: AblationOptions = field(default_factory=AblationOptions)


def parse(description: str, default: Path, argv: Sequence[str] | None = None) -> Config:
    """The configuration of a job from its command line.

    default: the preset that is read where no `--config` is given. Raises InputError on a key or a
    value that is wrong.
    """
    return parse_tree(Config, description, default, argv)[0]


Tree = TypeVar("Tree")


def parse_tree(
    tree: type[Tree],
    description: str,
    default: Path,
    argv: Sequence[str] | None = None,
    *,
    can_plan: bool = False,
) -> tuple[Tree, bool]:
    """The options of a job whose rooms are the fields of the dataclass `tree`, and whether it `can_plan` and
    `--plan` is given."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        description=description, default_env=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help=f"YAML preset; overrides follow it. Default: {default.name}"
    )
    if can_plan:
        parser.add_argument(
            "--plan", action="store_true", help="Only say what the job would take: read obs, start nothing."
        )
    rooms = dataclasses.fields(tree)  # type: ignore[arg-type]
    for room in rooms:
        parser.add_class_arguments(room.default_factory, room.name)  # type: ignore[arg-type]
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", str(default), *argv]
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        raise InputError(f"configuration: {error} (every key: --help)") from error
    config = tree(
        **{
            room.name: room.default_factory(**vars(values[room.name]))  # type: ignore[operator, misc]
            for room in rooms
        }
    )
    check_bounds(config)
    if isinstance(config, Config):
        check_training(config)
    return config, can_plan and values["plan"]


AT_LEAST_ONE = [
    "census.slice_nnz",
    "census.attempts",
    "census.expected_cells",
    "corpus.row_group_cells",
    "corpus.window_steps",
    "corpus.prefetch",
    "model.cell_layers",
    "model.cell_width",
    "model.cell_heads",
    "model.projection",
    "objective.mgm_chunk",
    "objective.logit_rows",
    "objective.ctm_cells",
    "train.num_workers",
    "train.global_batch",
    "train.micro_batch",
    "train.stage1_epochs",
    "train.stage2_epochs",
    "train.min_workers",
    "train.checkpoint_epochs",
    "train.keep_last",
    "train.max_skipped",
    "train.evaluate_epochs",
    "train.collective_timeout_s",
    "train.resize_s",
    "eval.top_k",
    "eval.max_cells",
    "eval.batch_tokens",
    "run.seeds",
    "score.top_k",
    "score.batch_tokens",
    "annotate.actors",
    "annotate.chunk",
    "annotate.figure_cells",
    "ablation.concurrent",
    "finetune.lora_rank",
    "finetune.shots",
    "finetune.num_workers",
    "evaluate.seeds",
    "evaluate.max_cells",
    "evaluate.top_k",
    "evaluate.batch_tokens",
    "evaluate.shot_steps",
    "fit.epochs",
    "fit.batch",
    "fit.batch_tokens",
]
SHARES = [
    "text.short_share",
    "census.most_unreadable",
    "corpus.test_share",
    "corpus.val_share",
    "model.cell_dropout",
    "objective.mask_ratio",
    "train.warmup_share",
    "eval.a",
    "score.a",
    "score.min_score",
    "score.roll_up",
    "finetune.test_share",
    "finetune.val_share",
    "evaluate.a",
    "fit.warmup_share",
]
NOT_NEGATIVE = [
    "objective.w_mgm",
    "objective.w_cc",
    "objective.w_ct",
    "objective.w_ctm",
    "train.stage1_lr",
    "train.cpus_per_worker",
    "text.short_variants",
    "train.lr",
    "train.text_lr",
    "train.weight_decay",
    "train.clip",
    "train.checkpoint_steps",
    "train.checkpoint_minutes",
    "train.skip_grad_norm",
    "train.profile",
    "fit.lr",
    "fit.head_lr",
    "fit.weight_decay",
    "fit.clip",
]
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(AT_LEAST_ONE, (1, math.inf)),
    **dict.fromkeys(SHARES, (0, 1)),
    **dict.fromkeys(NOT_NEGATIVE, (0, math.inf)),
    "tokens.max_length": (2, math.inf),
    "text.max_length": (3, math.inf),
    "objective.tau": (1e-3, 10),
    "train.max_failures": (-1, math.inf),
    "finetune.max_failures": (-1, math.inf),
}
"""Least and greatest value of every number that has one."""


def check_bounds(config: Any) -> None:
    """Check what a type cannot say. Raises InputError naming the key, its value and what it may be.

    First what must not be printed: a URI with credentials, whose value no message repeats.
    """
    given = dataclasses.asdict(config)
    for option, text in _texts(given):
        if "://" in text:
            refuse_secrets(option, text)
    for key, (least, greatest) in BOUNDS.items():
        room, name = key.split(".")
        value = given.get(room, {}).get(name)
        if value is not None and not least <= value <= greatest:
            most = "" if greatest == math.inf else f", at most {greatest:g}"
            raise InputError(f"--{key} is {value}; it must be at least {least:g}{most}.")


def check_training(config: Config) -> None:
    """Check what options of a training say together. Raises InputError."""
    if config.model.cell_width % config.model.cell_heads:
        raise InputError(
            f"--model.cell_width ({config.model.cell_width}) must be a multiple of --model.cell_heads "
            f"({config.model.cell_heads})."
        )
    low, high = TAU_RANGE
    if config.objective.tau_learnt and not low <= config.objective.tau <= high:
        raise InputError(
            f"--objective.tau is {config.objective.tau}; where it is learnt it stays, and must start, within "
            f"{low:g} and {high:g}."
        )
    train = config.train
    if train.global_batch % train.micro_batch:
        raise InputError(
            f"--train.global_batch ({train.global_batch}) must be a multiple of --train.micro_batch "
            f"({train.micro_batch})."
        )
    if train.min_workers is not None and train.min_workers > train.num_workers:
        raise InputError(
            f"--train.min_workers ({train.min_workers}) is more than --train.num_workers "
            f"({train.num_workers})."
        )
    if (lanes := train.global_batch // train.micro_batch) < train.num_workers:
        raise InputError(
            f"--train.global_batch {train.global_batch} over --train.micro_batch {train.micro_batch} makes "
            f"{lanes} lanes for {train.num_workers} workers: some would have nothing to do. Raise the global "
            "batch, or lower the micro-batch or --train.num_workers."
        )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text among the options, in lists and dictionaries too, with the name of its option."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def to_yaml(config: Any) -> str:
    """The resolved configuration, readable by `--config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
