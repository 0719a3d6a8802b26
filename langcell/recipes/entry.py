"""How every job starts: parse, run one recipe, and end with an exit code that scripts can trust."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from langcell.config import Config, parse_tree
from langcell.errors import InputError, Interrupted, RunError

FAILED, INPUT_ERROR, RESUME = 1, 2, 75


def later(name: str, **given: Any) -> Callable[[Any], Any]:
    """The recipe `module:function` of this package, loaded when it is called: torch, DeepSpeed and
    transformers take 10 s to import, for which neither `--help` nor a wrong key should wait.

    given: what it gets beside the configuration.
    """

    def recipe(config: Any) -> Any:
        return pkgutil.resolve_name(f"langcell.recipes.{name}")(config, **given)

    return recipe


def main(
    recipe: Callable[[Any], Any],
    description: str,
    default: Path,
    argv: Sequence[str] | None = None,
    *,
    tree: type = Config,
    plan: Callable[[Any], Any] | None = None,
) -> int:
    """Exit code of a job: 0; 2 with a message on stderr for what the user can mend; 1 with one for a run that
    cannot go on; 75 for one that was told to stop and can be resumed.

    tree: the dataclass whose fields are the rooms of the job's options. plan: what `--plan` runs instead of
    the recipe, for a job that can say beforehand what it will take.
    """
    try:
        config: Any
        config, only_plan = parse_tree(tree, description, default, argv, can_plan=plan is not None)
        (plan if plan and only_plan else recipe)(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except Interrupted as error:
        resuming = " with --run.resume auto" if hasattr(config.run, "resume") else ""
        print(f"stopped: {error}; the same command{resuming} goes on", file=sys.stderr)
        return RESUME
    return 0
