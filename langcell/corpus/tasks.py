"""How tasks are run on Ray: retried a bounded number of times, and failing in words.

A task that always kills its worker is given up after `RETRIES`; Ray Data's own default is for ever. What
storage raises is retried inside the task (`census.reading`). Ray Data's settings are measured: its default
reservation of resources would leave half of the CPUs idle (9.7k against 18.6k rows/s of the token pass), and
an unbounded block keeps a slice in one piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.util.annotations import RayDeprecationWarning

from langcell.errors import InputError

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Environment of workers: TileDB's threads, new with every slice, would each leave freed memory in an arena
of glibc's of their own (a token worker 0.93 GB instead of 0.46, a beta worker 0.86 instead of 0.33)."""

RETRIES = 3
"""Times that a task whose worker died is run again."""


def task(function: Callable[..., Any], num_returns: int = 1) -> Any:
    """`function` as a Ray task, anywhere on the cluster: in a Tune trial, too, whose own reservation has room
    for its driver alone."""
    return ray.remote(num_returns=num_returns, max_retries=RETRIES, scheduling_strategy="DEFAULT")(function)


@contextmanager
def graph() -> Iterator[dict[str, int]]:
    """Ray Data as a pass over slices needs it, until the block ends; what its operators are given.

    Raises InputError as `plainly` does.
    """
    context = DataContext.get_current().copy()
    context.op_resource_reservation_enabled = False
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context), warnings.catch_warnings(), plainly():
        # Ray 2.60 has no other place for max_retries that leaves two operators fused.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield {"max_retries": RETRIES}


@contextmanager
def plainly() -> Iterator[None]:
    """Raises InputError, without a worker's traceback, for what the user can mend: a mistake, storage that
    fails, workers that die."""
    try:
        yield
    except RayTaskError as error:
        cause = _cause(error)
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        if isinstance(cause, OSError):
            raise InputError(f"storage fails: {cause}. The same command goes on from here.") from error
        raise
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise InputError(
            f"a worker died {RETRIES + 1} times at the same work. Most likely its node lacks memory: "
            "lower --census.slice_nnz (--plan says how much memory a task takes), or use larger nodes. The "
            "same command goes on with what is whole."
        ) from error


def _cause(error: BaseException) -> BaseException:
    """What was raised in the task, under Ray's wrappings."""
    inner = getattr(error, "cause", None) or error.__cause__
    return error if inner is None or inner is error else _cause(inner)
