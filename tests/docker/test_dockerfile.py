"""The image file and the lock file, as far as they can be held to their word without a Docker daemon."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "docker" / "constraints.txt"
PROJECT = "langcell"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile; comments dropped, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def of(kind: str) -> list[str]:
    return [rest for word, rest in instructions() if word == kind]


def pins() -> dict[str, Version]:
    """Package (canonical name) to pinned version; fails on a line that is not a plain pin."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"not a plain pin, or one with a local part: {line}"
        found[canonicalize_name(match[1])] = Version(match[2])
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def test_every_instruction_is_one() -> None:
    known = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    assert {word for word, _ in instructions()} <= known


def test_base_can_be_chosen() -> None:
    assert instructions()[0][0] == "ARG"
    assert of("ARG") == ["BASE=nvidia/cuda:13.0.2-base-ubuntu24.04"]
    assert of("FROM") == ["${BASE}"]


def test_sources_exist_and_reach_the_builder() -> None:
    """A COPY of what is absent, untracked or kept out by .dockerignore fails only when the image is built."""
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[0] == "*", "the context is what is named: no checkout of data, runs or .venv travels"
    for arguments in of("COPY"):
        *sources, _ = shlex.split(arguments)
        for source in sources:
            assert f"!{source}" in ignore
            assert (
                subprocess.run(
                    ["git", "ls-files", "--error-unmatch", source], cwd=ROOT, capture_output=True, check=False
                ).returncode
                == 0
            ), f"{source} is not in the repository"


def test_installs_from_the_lock_file_and_runs_as_a_user() -> None:
    installs = [line for line in of("RUN") if "pip install" in line]
    assert installs
    assert all("-c docker/constraints.txt" in line for line in installs)
    assert of("USER") == ["ray"]
    assert instructions()[-1][0] == "CMD"
    # Ray's launcher takes the home folder, into which it mounts the token, from here.
    assert any("HOME=/home/ray" in shlex.split(line) for line in of("ENV"))


def test_torch_is_pinned_for_every_build() -> None:
    assert pins()["torch"].local is None
    assert Version("2.13.0+cu130") in Requirement(f"torch=={pins()['torch']}").specifier


def test_lock_file_holds_every_dependency_at_a_version_the_project_admits() -> None:
    """The whole closure of langcell[dev] in this environment; one added later must be locked too."""
    locked, seen = pins(), set()

    def visit(requirement: Requirement) -> Iterator[Requirement]:
        for extra in {"", *requirement.extras}:
            key = (canonicalize_name(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            try:
                needed = map(Requirement, requires(requirement.name) or [])
            except PackageNotFoundError:
                pytest.fail(f"{requirement} is not installed here")
            for one in needed:
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    yield one
                    yield from visit(one)

    direct = list(visit(Requirement(f"{PROJECT}[dev]")))
    assert len(direct) > 100
    for needed in direct:
        name = canonicalize_name(needed.name)
        if name == PROJECT:
            continue
        assert name in locked, f"{needed} is not in {LOCK.name}: make lock"
        assert needed.specifier.contains(locked[name], prereleases=True), (
            f"{needed}: {locked[name]} is locked"
        )
