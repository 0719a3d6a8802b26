"""What the doctor has done on the nodes: tell the software, use the storage, read weights, sum over workers.

Everything here is a plain function that a Ray task or actor runs; what it finds goes back as values, for the
driver to judge (`doctor`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
import uuid
from dataclasses import dataclass
from importlib import metadata

import ray
import torch
import torch.distributed as dist
from ray._common.utils import get_system_memory

from langcell.census.options import CensusOptions
from langcell.census.source import open_source
from langcell.model.interop import load_config, load_state, load_tokenizer, text_path
from langcell.model.options import ModelOptions
from langcell.storage import open_root, read_file, write_file

PACKAGES = (
    *("langcell", "ray", "torch", "deepspeed", "transformers", "safetensors"),
    *("tiledbsoma", "cellxgene-census", "pyarrow", "numpy", "numba"),
)
"""Whose versions must be one in all processes: what they pickle, compute or write for each other."""
WRITTEN = 8 << 20
SUMMED = 64 << 20
"""Bytes that are written and read, and that the workers sum."""
ROUNDS = 5
FOLDER = ".doctor"
"""Where files are written, within the folder that is tried."""


def versions() -> dict[str, str]:
    """Python and packages of this process; `missing` for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def write(uri: str) -> tuple[str, float]:
    """Write a file of `WRITTEN` bytes below the folder `uri`; its name, and MB/s.

    Raises OSError, InputError.
    """
    root, name = open_root(uri, "storage"), f"{FOLDER}/{uuid.uuid4().hex}"
    root.create_dir(FOLDER, recursive=True)
    data, began = os.urandom(WRITTEN), time.perf_counter()
    write_file(root, name, data)
    return name, WRITTEN / 1e6 / (time.perf_counter() - began)


def read(uri: str, names: list[str]) -> tuple[list[str], float]:
    """Which of the files cannot be seen from here, and MB/s of reading the others."""
    root, missing, began = open_root(uri, "storage"), [], time.perf_counter()
    for name in names:
        try:
            if len(read_file(root, name)) != WRITTEN:
                missing.append(name)
        except FileNotFoundError:
            missing.append(name)
    seen = len(names) - len(missing)
    return missing, seen * WRITTEN / 1e6 / (time.perf_counter() - began)


def clear(uri: str) -> None:
    """Remove what was written."""
    with contextlib.suppress(OSError):  # another node was first
        open_root(uri, "storage").delete_dir(FOLDER)


def weights(model: ModelOptions) -> int:
    """Read the checkpoints that training starts from; how many there are. Raises InputError, OSError."""
    path = text_path(model.text_init)
    load_config(path, "model.text_init")
    load_tokenizer(model.text_init)
    load_state(path, "model.text_init")
    if model.cell_init is None:
        return 1
    load_config(model.cell_init, "model.cell_init")
    load_state(model.cell_init, "model.cell_init")
    return 2


def census(options: CensusOptions) -> int:
    """Open the Census, and count the cells that the filter matches. Raises InputError, OSError."""
    source = open_source(options)
    try:
        return int(source.obs([]).num_rows)
    finally:
        source.close()


@dataclass(frozen=True)
class Seat:
    """Where a worker stands. memory: bytes of its GPU, or of its host; device: the GPU's name, or `cpu`."""

    host: str
    device: str
    memory: int


@ray.remote
class Worker:
    """One of the workers that sum together, as training's will."""

    def seat(self) -> Seat:
        host = ray.util.get_node_ip_address()
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            return Seat(host, gpu.name, gpu.total_memory)
        return Seat(host, "cpu", get_system_memory())  # of the container, where it is one

    def port(self) -> int:
        """One that is free here."""
        with socket.socket() as one:
            one.bind(("", 0))
            number: int = one.getsockname()[1]
            return number

    def join(self, rank: int, ranks: int, host: str, port: int) -> None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{host}:{port}", rank=rank, world_size=ranks)

    def sum(self) -> float:
        """Bus bandwidth of all-reduce (bytes/s), as NCCL's tests count it: what each link carries."""
        cuda = torch.cuda.is_available()
        values = torch.ones(SUMMED // 4, device="cuda" if cuda else "cpu")
        dist.all_reduce(values)  # the first also opens connections
        ranks = dist.get_world_size()
        assert bool((values == ranks).all()), "a sum over the workers is wrong"
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(ROUNDS):
            dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / ROUNDS
        return SUMMED / seconds * 2 * (ranks - 1) / ranks
