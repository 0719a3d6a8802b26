"""The image's install steps, carried out where no Docker daemon is: the Dockerfile's own lines in a clean
environment.

Stages are folders: the absolute paths of the Dockerfile lie in a temporary one, COPY copies, ENV and WORKDIR
hold for what follows, and RUN runs where it is about Python. Left out is what needs root and Ubuntu: apt-get
and the user. The last stage starts empty, so what it does not copy from the one before is missing. Packages
come from where this machine's pip takes them, so the kind is that of the PyTorch build found there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.docker.reading import EARLIER, LOCK, ROOT, Instruction, instructions, of

FOLDERS = re.compile(r"(?<![\w.*/-])/(?=(?:opt|src|wheels|home)\b)")
"""Where an absolute path of the image starts."""
MOUNT = re.compile(r"--mount=(\S+)\s*")


class Image:
    """A folder as the file system of the stage that is being built."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.earlier = folder / "earlier"
        # An interpreter as Ubuntu's, which sees no environment of ours.
        self.base = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_"))}
        self.base["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.start()

    def start(self) -> None:
        """A stage from the base image: nothing in it, nothing said of it."""
        self.root.mkdir()
        self.directory = self.root
        self.environment = dict(self.base)

    def place(self, text: str) -> str:
        return FOLDERS.sub(f"{self.root}/", text)

    def next_stage(self) -> None:
        self.root.rename(self.earlier)
        self.start()

    def build(self, one: Instruction) -> None:
        if one.word == "ENV":
            for pair in shlex.split(one.rest):
                name, value = self.place(pair).split("=", 1)
                self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif one.word == "WORKDIR":
            self.directory = Path(self.place(one.rest))
            self.directory.mkdir(parents=True, exist_ok=True)
        elif one.word == "COPY":
            self.copy(*shlex.split(one.rest))
        elif one.word == "RUN" and ("pip " in one.rest or " venv " in one.rest):
            self.run(one.rest)

    def copy(self, *arguments: str) -> None:
        *sources, target = arguments
        if sources[0].startswith(EARLIER):
            _, source = sources
            self.bring(source, target)
            return
        for source in sources:
            found, to = ROOT / source, self.directory / target
            if found.is_dir():
                shutil.copytree(found, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to = to / found.name if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, to)

    def bring(self, source: str, target: str) -> None:
        """What an earlier stage made, moved: its gigabytes are wanted once."""
        to = self.root / target.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        (self.earlier / source.lstrip("/")).rename(to)

    def run(self, line: str) -> None:
        for mount in MOUNT.findall(line):
            options = dict(option.split("=", 1) for option in mount.split(","))
            if options["type"] == "bind":
                self.bring(options["source"], options["target"])
        self.call(["/bin/sh", "-c", self.place(MOUNT.sub("", line))])
        for settings in self.root.glob("opt/*/pyvenv.cfg"):
            # The base image has Python alone; what this machine's has beside is none of the image's.
            settings.write_text(settings.read_text().replace("site-packages = true", "site-packages = false"))

    def call(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}"
        return done.stdout


@pytest.mark.slow
def test_what_the_dockerfile_installs_works(tmp_path: Path) -> None:
    image = Image(tmp_path)
    steps = [one for one in instructions() if one.stage in ("build", "runtime")]
    for one in steps:
        if one.word == "FROM" and one.stage == "runtime":
            image.next_stage()
        image.build(one)
    python = image.root / "opt" / "langcell" / "bin" / "python"
    assert shutil.which("python", path=image.environment["PATH"]) == str(python)

    # Nothing but what is locked, and no conflict among it.
    lock: set[tuple[str, str]] = set(re.findall(r"^([\w.-]+)==(\S+)$", LOCK.read_text(), re.M))
    locked = {(canonicalize_name(name), version) for name, version in lock}
    listed = json.loads(image.call([str(python), "-m", "pip", "list", "--format=json"]))
    installed = {(canonicalize_name(one["name"]), one["version"].split("+")[0]) for one in listed}
    assert {name for name, _ in installed - locked} == {"langcell", "pip"}
    image.call([str(python), "-m", "pip", "check"])

    # What a container does: its health check, its command, and on a head the launcher's clients of clouds.
    image.environment["RAY_TMPDIR"] = str(tmp_path)  # this machine's Rays are not the container's
    [health] = of("HEALTHCHECK", "runtime")
    image.call(json.loads(image.place(health.split(" CMD ")[1])))
    [command] = of("CMD", "runtime")
    assert "--train.global_batch" in image.call([*json.loads(command), "--help"])
    for cloud in ("aws", "gcp"):
        image.call(["python", "-c", f"import ray.autoscaler._private.{cloud}.node_provider"])
