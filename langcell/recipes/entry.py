"""How every job starts: parse, run one recipe, and end with an exit code that scripts can trust."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from langcell.config import Config, parse_job
from langcell.errors import InputError

INPUT_ERROR = 2


def main(
    recipe: Callable[[Config], Any],
    description: str,
    default: Path,
    argv: Sequence[str] | None = None,
    *,
    plan: Callable[[Config], Any] | None = None,
) -> int:
    """Exit code of a job: 0, or 2 with a message on stderr for what the user can mend.

    plan: what `--plan` runs instead of the recipe, for a job that can say beforehand what it will take.
    """
    try:
        config, only_plan = parse_job(description, default, argv, can_plan=plan is not None)
        (plan if plan and only_plan else recipe)(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    return 0
