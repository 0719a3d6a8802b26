"""A trace of a stage's steps, for seeing where the time goes.

The first three steps are left out: they allocate, compile and, at ZeRO 3, learn the order of modules.
Two files a stage: a Chrome trace (Perfetto and chrome://tracing open it; a step of a small encoder on a
CPU is about 2 MB before compression) and a table of the operators that took longest. Only the recorded
steps pay for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from pyarrow import fs
from torch.profiler import ProfilerActivity, profile, schedule

from langcell.storage import write_file

WAIT, WARMUP = 2, 1
"""Steps that are passed over, and steps that only start the tracer."""
ROWS = 60


class Profile:
    """Traces `steps` steps of a stage; a context around the stage's loop, told of each step's end.

    root: filesystem of the run directory, where `profile/<name>.json.gz` and `.txt` go; steps: 0 traces
    nothing. A stage that ends sooner leaves the steps that were recorded, or no file where there were none.
    """

    def __init__(self, root: fs.FileSystem, name: str, steps: int) -> None:
        self._root, self._name = root, name
        self._profile: profile | None = None
        if steps:
            cuda = torch.cuda.is_available()
            self._sort = "self_device_time_total" if cuda else "self_cpu_time_total"
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
                schedule=schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Profile:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, traceback)

    def step(self) -> None:
        """A step of training has ended."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, done: profile) -> None:
        self._root.create_dir("profile", recursive=True)
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory, "trace.json.gz")
            done.export_chrome_trace(str(trace))
            write_file(self._root, f"profile/{self._name}.json.gz", trace.read_bytes())
        table = done.key_averages().table(sort_by=self._sort, row_limit=ROWS)
        write_file(self._root, f"profile/{self._name}.txt", table.encode())
