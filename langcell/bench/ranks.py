"""Several ranks over gloo on this machine, without Ray: for numerics and for counting.

A forkserver that has imported torch and DeepSpeed once makes a two-rank run cost 2-3 s.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

PRELOAD = ["torch", "deepspeed", "transformers.models.bert.modeling_bert", "langcell.train.engine"]

TIMEOUT_S = 600


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo group; the results in rank order.

    The function must be importable (a module's own). An exception of a rank is raised here.
    """
    context = mp.get_context("forkserver")
    _start_server()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_rank, args=(function, rank, world, directory, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        _wait(processes)
        results = [pickle.loads((Path(directory) / f"{rank}").read_bytes()) for rank in range(world)]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended well. Raises RuntimeError for the first that does not, and kills the others, which
    would wait for it in their next collective."""
    rank_of = {process.sentinel: rank for rank, process in enumerate(processes)}
    end = time.monotonic() + TIMEOUT_S
    try:
        while rank_of:
            ended = connection.wait(list(rank_of), timeout=max(0.0, end - time.monotonic()))
            if not ended:
                raise RuntimeError(f"ranks {sorted(rank_of.values())} did not end in {TIMEOUT_S} s")
            for sentinel in ended:
                rank = rank_of.pop(cast(int, sentinel))
                processes[rank].join()
                if code := processes[rank].exitcode:
                    raise RuntimeError(f"rank {rank} of {len(processes)} ended with {code}")
    finally:
        for process in processes:
            process.kill()


def _start_server() -> None:
    """Start the server of all ranks, if need be, without a GPU: DeepSpeed would take one that it sees."""
    forkserver.set_forkserver_preload(PRELOAD)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _rank(function: Callable[..., Any], rank: int, world: int, directory: str, args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it; Ray Train sets it too
    store = dist.FileStore(f"{directory}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        result: Any = function(rank, *args)
    except Exception as error:
        error.add_note(f"on rank {rank} of {world}")
        result = error
    (Path(directory) / f"{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
