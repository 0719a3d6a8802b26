"""Joining Ray: the cluster that is there, else one of our own on this machine.

A job submitted by `ray job submit`, or started beside `ray start --head`, joins that cluster. With
none in sight a local one is started and ended with the job; its dashboard listens on loopback (Ray's
own control ports cannot be bound to it: on an open network start Ray with token authentication, and
join that). It has two logical CPUs at least: a trainer that holds the only one would wait for data
tasks for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from langcell.corpus.tasks import ONE_ARENA
from langcell.errors import InputError
from langcell.recipes.options import PlaceOptions, RunOptions

ENVIRONMENT = {
    # A worker's death and its reports are noticed at this cadence; 2 s a report by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Every print of a worker would come twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    **ONE_ARENA,
    # PyTorch deprecates collectives that DeepSpeed still calls, once per process.
    "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
}


@contextmanager
def connect(options: RunOptions | PlaceOptions) -> Iterator[None]:
    """Run the body connected to Ray. Raises InputError for an address where no cluster answers."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if ray.is_initialized():
        yield
        return
    runtime_env = {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}
    if options.ray_address != "local":
        try:
            ray.init(
                address=options.ray_address or "auto", logging_level=logging.WARNING, runtime_env=runtime_env
            )
        except ConnectionError as error:
            if options.ray_address is not None or "RAY_ADDRESS" in os.environ:
                raise InputError(
                    f"no Ray cluster answers at {options.ray_address or os.environ['RAY_ADDRESS']}: {error}"
                ) from error
    if not ray.is_initialized():
        # Ray would write a token file into the home folder, which surprises later starts.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        runtime_env["env_vars"]["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts this machine
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            runtime_env=runtime_env,
        )
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # a table of operators every five seconds
    try:
        yield
    finally:
        ray.shutdown()
