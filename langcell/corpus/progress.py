"""How far a pass over slices is: a bar on the terminal, and gauges on Ray's Prometheus endpoint.

The driver counts what has come back; `ray_langcell_prepare_slices`, `..._slices_total` and `..._cells_per_s`
have a label `pass`. What an interrupted job finished before is in no pass of this one. A pass that is through
keeps its last values while the job goes on.
"""

from __future__ import annotations

import time

from ray.util.metrics import Gauge
from tqdm import tqdm

GAUGES = {
    "slices": "Slices of a pass that are through",
    "slices_total": "Slices of a pass",
    "cells_per_s": "Cells per second, from the beginning of the pass to its last slice",
}


class Progress:
    """Progress of the pass `name` over `slices` slices; a context around it."""

    def __init__(self, name: str, slices: int) -> None:
        self._bar = tqdm(total=slices, desc=name, unit="slice")
        self._began, self._slices, self._cells = time.monotonic(), 0, 0
        self._gauges = {
            key: Gauge(f"langcell_prepare_{key}", text, ("pass",)) for key, text in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"pass": name})
        self._gauges["slices"].set(0)
        self._gauges["slices_total"].set(slices)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, cells: int) -> None:
        """A slice of `cells` cells is through."""
        self._bar.update()
        self._slices += 1  # a bar that is switched off does not count
        self._cells += cells
        self._gauges["slices"].set(self._slices)
        self._gauges["cells_per_s"].set(self._cells / (time.monotonic() - self._began))
