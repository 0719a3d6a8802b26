"""The scripts in jobs/: what they cost before they begin, and that what they begin exists."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.head import ROOT

JOBS = sorted((ROOT / "jobs").glob("*.py"))
HEAVY = {
    "anndata",
    "deepspeed",
    "numba",
    "numpy",
    "pyarrow",
    "ray",
    "scipy",
    "tiledbsoma",
    "torch",
    "transformers",
}


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_help_loads_no_library_that_computes(job: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(job), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "jsonargparse" in loaded
    assert not loaded & HEAVY
    assert "usage: " in done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_what_is_loaded_later_exists(job: Path) -> None:
    names = re.findall(r'later\("([^"]+)"', job.read_text())
    assert names or job.stem == "bench"
    for name in names:
        assert callable(pkgutil.resolve_name(f"langcell.recipes.{name}"))
