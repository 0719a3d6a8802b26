"""How a benchmark starts: `bench.py NAME [options]`, with the options of that benchmark alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from langcell.bench.options import (
    AnnotateOptions,
    DataOptions,
    ScaleOptions,
    ShuffleOptions,
    StepOptions,
)
from langcell.errors import InputError

BENCHMARKS = {
    "data": DataOptions,
    "step": StepOptions,
    "scale": ScaleOptions,
    "shuffle": ShuffleOptions,
    "annotate": AnnotateOptions,
}
"""Options of each benchmark, which is `run` of the module of its name (loaded when it is asked for)."""
INPUT_ERROR = 2


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Exit code of a benchmark: 0, or 2 with a message on stderr for what the user can mend."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description, exit_on_error=False, default_env=False, allow_abbrev=False
    )
    benchmarks = parser.add_subcommands(dest="name")
    for name, options in BENCHMARKS.items():
        own = ArgumentParser(exit_on_error=False, default_env=False, allow_abbrev=False)
        own.add_argument("--config", action="config", help="YAML file of options; overrides follow it")
        own.add_class_arguments(options)
        benchmarks.add_subcommand(name, own)
    try:
        asked = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        values = vars(asked[asked.name])
        values.pop("config", None)
        importlib.import_module(f"langcell.bench.{asked.name}").run(BENCHMARKS[asked.name](**values))
    except ArgumentError as error:
        print(f"error: configuration: {error} (every key: --help)", file=sys.stderr)
        return INPUT_ERROR
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    return 0
