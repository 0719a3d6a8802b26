"""Several ranks over gloo on this machine, without Ray: for numerics and for counting.

A forkserver that has imported torch and DeepSpeed once makes a two-rank run cost 2-3 s.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "deepspeed", "transformers.models.bert.modeling_bert", "langcell.train.engine"]


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
        for process in processes:
            process.join(timeout=600)
        for rank, process in enumerate(processes):
            if process.exitcode != 0:
                for other in processes:
                    other.kill()
                raise RuntimeError(f"rank {rank} of {world} ended with {process.exitcode} (None: it hung)")
        results = [pickle.loads((Path(directory) / f"{rank}").read_bytes()) for rank in range(world)]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


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
