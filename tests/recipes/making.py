"""The demo's configuration with a model of one narrow layer."""

from __future__ import annotations

from pathlib import Path

from langcell.config import Config, parse

ROOT = Path(__file__).parents[2]
DEMO, RECORDS = ROOT / "jobs" / "configs" / "demo.yaml", ROOT / "jobs" / "records"
TINY = {"model.cell_layers": "1", "model.cell_width": "32", "train.gpus": "null"}


def argv(uri: str, corpus: Path | str, **changed: object) -> list[str]:
    """`train__seed=1` changes an option."""
    options = {"census.uri": uri, "corpus.dir": str(corpus), **TINY}
    options |= {name.replace("__", "."): str(value) for name, value in changed.items()}
    return [f"--{name}={value}" for name, value in options.items()]


def config(uri: str, corpus: Path | str, **changed: object) -> Config:
    return parse("", DEMO, argv(uri, corpus, **changed))
