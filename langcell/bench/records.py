"""Records of measurements: dated, with machine and commit, one JSON object a line, only added to.

A figure without the machine it was measured on, the load that it was under and the commit that was measured
cannot be compared with a later one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from langcell.bench.figures import Figures
from langcell.bench.options import (
    AnnotateOptions,
    DataOptions,
    ScaleOptions,
    ShuffleOptions,
    StepOptions,
)
from langcell.files import write_whole

FOLDER = Path(__file__).parents[2] / "jobs" / "records"
"""Where the project keeps them: `<benchmark>.jsonl`."""
LIBRARIES = (
    *("numpy", "scipy", "numba", "pyarrow", "tiledbsoma", "cellxgene-census", "ray"),
    *("torch", "deepspeed", "transformers"),
)


def publish(
    name: str,
    options: DataOptions | StepOptions | ScaleOptions | ShuffleOptions | AnnotateOptions,
    summary: Figures,
    table: str,
) -> None:
    """What a benchmark ends with: summary.json in `options.dir` (which is there), the table, and the place of
    both; with `options.record` a record too."""
    path = Path(os.path.abspath(options.dir)) / "summary.json"
    write_whole(path, json.dumps(summary, indent=1))
    print(table, f"\nsummary  {path}", sep="\n", flush=True)
    if options.record:
        record = FOLDER / f"{name}.jsonl"
        append_record(record, parameters(options), summary)
        print(f"record   {record}", flush=True)


def parameters(options: Any) -> dict[str, Any]:
    """What was measured, without where: folders of one machine tell nothing on another, and may tell of its
    owner. A model is named within the checkout, or by its folder alone."""
    values = {name: value for name, value in asdict(options).items() if name not in ("dir", "record")}
    if values.get("model") is not None:
        model, checkout = Path(os.path.abspath(values["model"])), FOLDER.parents[1]
        values["model"] = str(model.relative_to(checkout)) if model.is_relative_to(checkout) else model.name
    return values


def append_record(path: Path, parameters: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add a record to the file `path` (made if need be): date, commit, machine, parameters and figures."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(),
        "parameters": parameters,
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory (GiB), Python and libraries."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether tracked or new files differ from it (None: no Git)."""
    try:
        head, status = (
            subprocess.run(
                ["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True
            ).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head.strip(), "dirty": bool(status.strip())}
