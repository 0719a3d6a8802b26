"""What a run says while it runs: metrics.jsonl, gauges on Ray's Prometheus endpoint, trackers.

One JSON object a step, by rank 0; a resume first cuts the file back to its cursor, so that every step stands
in it once, and notes that in recoveries.jsonl: what was lost, and since when. A local file is appended to; an
object store knows no append, so there the file is written anew before each checkpoint, which is what a resume
would cut it back to (steps that were lost are not seen there, nor counted as trained again). A row that
cannot be written waits for the next: no disk ends a training step.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from typing import Any

import pyarrow as pa
from pyarrow import fs

from langcell.storage import read_file, write_file
from langcell.train.gauges import Gauges
from langcell.train.trackers import Trackers

METRICS = "metrics.jsonl"
RECOVERIES = "recoveries.jsonl"


class Metrics:
    """The writer of rank 0.

    root: filesystem of the run directory; first_step: global step that the stage goes on from; saved: when
    the checkpoint was made that it goes on from (s since 1970), if there is one.
    """

    def __init__(
        self,
        root: fs.FileSystem,
        run: str,
        stage: int,
        first_step: int,
        trackers: Trackers,
        saved: float | None = None,
    ) -> None:
        self._root, self._lock, self._trackers = root, threading.Lock(), trackers
        rows = cut_back(root, stage, first_step)
        self._epoch, self._sums, self._count = -1, dict[str, float](), dict[str, int]()
        self._lines: list[bytes] = []
        """Rows that are not in the file yet; where nothing can be appended, all rows."""
        self._local: pa.NativeFile | None = None
        for row in rows:
            if row["stage"] == stage:
                self._add(row)
        try:
            self._local = root.open_append_stream(METRICS)
        except NotImplementedError:
            self._lines = [_line(row) for row in rows]
        self._recoveries = read(root, RECOVERIES)
        self._gauges = Gauges(run, stage, self._recoveries, saved)

    def write(self, row: dict[str, Any], losses: dict[str, float]) -> None:
        """One step: the row with its losses goes to the file, the gauges and the trackers. What is no number
        is null."""
        whole = {name: _number(value) for name, value in {**row, **losses}.items()}
        self._add(whole)
        with self._lock:
            self._lines.append(_line(whole))
            if self._local is not None:
                try:
                    self._local.write(b"".join(self._lines))
                    self._local.flush()
                    self._lines = []
                except OSError as error:
                    print(f"{METRICS}: {error}; the row waits for the next", flush=True)
                    if self._lines[0] != b"\n":
                        self._lines.insert(0, b"\n")  # ends what was written of it
        if self._recoveries and "resumed" not in self._recoveries[-1]:
            self._recoveries[-1]["resumed"] = whole["time"]
            with contextlib.suppress(OSError):
                _note(self._root, self._recoveries)
        self._gauges.step(whole, tuple(losses))
        self._trackers.log(whole)

    def committed(self) -> None:
        """A checkpoint was committed just now."""
        self._gauges.committed()
        self._trackers.publish()

    def means(self, names: tuple[str, ...]) -> dict[str, float]:
        """Means of the losses `names` over the present epoch, its steps before a resume included."""
        return {
            name: self._sums[name] / self._count[name] if self._count.get(name) else math.nan
            for name in names
        }

    def _add(self, row: dict[str, Any]) -> None:
        if row["epoch"] != self._epoch:
            self._epoch, self._sums, self._count = row["epoch"], {}, {}
        for name, value in row.items():
            if isinstance(value, float):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._count[name] = self._count.get(name, 0) + 1

    def publish(self) -> None:
        """See to it that the file holds every row. Raises OSError."""
        if self._local is None:
            with self._lock:
                text = b"".join(self._lines)
            write_file(self._root, METRICS, text)

    def close(self) -> None:
        self._trackers.close()
        if self._local is not None:
            self._local.close()


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read(root: fs.FileSystem, name: str) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; a line that a crash or a full disk left half-written is passed over."""
    try:
        lines = read_file(root, name).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def cut_back(root: fs.FileSystem, stage: int, first_step: int) -> list[dict[str, Any]]:
    """Drop a stage's rows from global step `first_step` on, atomically, and note the recovery; what is left.

    Rows of the other stage stay. A stage that begins has no rows, and nothing is noted. A recovery: the step
    gone on from, how many steps that trains again (as far as the file has them), and when (s since 1970) the
    last step before it ended and, once there is one, its own first.
    """
    rows = read(root, METRICS)
    kept = [row for row in rows if row["stage"] != stage or row["step"] < first_step]
    before = [row for row in rows if row["stage"] == stage]
    if before:
        recovery = {
            "step": first_step,
            "steps_replayed": len(rows) - len(kept),
            "stopped": max(row["time"] for row in before),
        }
        noted = read(root, RECOVERIES)
        if noted and "resumed" not in noted[-1]:  # it came to no step: still the same interruption
            last = noted.pop()
            if last["stopped"] != recovery["stopped"]:  # else this very cut, which was not finished
                recovery["steps_replayed"] += last["steps_replayed"]
                recovery["stopped"] = max(recovery["stopped"], last["stopped"])
        _note(root, [*noted, recovery])
    write_file(root, METRICS, b"".join(map(_line, kept)))
    return kept


def _note(root: fs.FileSystem, recoveries: list[dict[str, Any]]) -> None:
    write_file(root, RECOVERIES, b"".join(map(_line, recoveries)))
