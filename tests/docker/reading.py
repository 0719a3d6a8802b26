"""The Dockerfile as a list of instructions, for the tests of what it says and of what it does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
LOCK = ROOT / "docker" / "constraints.txt"
EARLIER = "--from="
"""How a COPY says that its sources lie in an earlier stage."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; `stage` is the name of the stage that it stands in, empty before the first."""

    stage: str
    word: str
    rest: str


def instructions() -> list[Instruction]:
    """Those of the Dockerfile in order; comments dropped, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found, stage = [], ""
    for word, _, rest in (line.partition(" ") for line in lines if line):
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        found.append(Instruction(stage, word, rest.strip()))
    return found


def of(word: str, *stages: str) -> list[str]:
    """Arguments of one kind of instruction, in the stages that are named or else in all."""
    return [one.rest for one in instructions() if one.word == word and (not stages or one.stage in stages)]
