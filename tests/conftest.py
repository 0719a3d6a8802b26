"""What several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # before ray is imported


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of four logical CPUs for the whole test session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded mini Census, built once per session."""
    from langcell.census.demo import build_demo

    return build_demo(str(tmp_path_factory.mktemp("census") / "demo"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data for tests, or a skip where it does not stand beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no test data at {path}")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The prepared corpus of tiny training runs (`tests.faults.making.Tiny`), made by a process of its
    own."""
    import subprocess
    import sys

    from tests.faults.making import Tiny, argv

    folder = tmp_path_factory.mktemp("tiny")
    job = Path(__file__).parents[1] / "jobs" / "prepare.py"
    demo = job.parent / "configs" / "demo.yaml"
    command = [sys.executable, str(job), f"--config={demo}", "--run.ray_address=local", *argv(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return Tiny(folder)
