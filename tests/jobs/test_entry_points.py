"""The scripts in jobs/: what they cost before they begin, and that what they begin exists."""

from __future__ import annotations

import inspect
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
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no.such_key=1", 2)])
def test_what_the_parser_answers_waits_for_no_library(job: Path, option: str, code: int) -> None:
    command = [sys.executable, "-X", "importtime", str(job), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "jsonargparse" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_what_is_loaded_later_is_a_recipe(job: Path) -> None:
    names = re.findall(r'later\("([^"]+)"(?:, (\w+)=)?', job.read_text())
    assert names or job.stem == "bench"
    for name, given in names:
        recipe = pkgutil.resolve_name(f"langcell.recipes.{name}")
        inspect.signature(recipe).bind("the configuration", **dict.fromkeys([given] if given else []))
