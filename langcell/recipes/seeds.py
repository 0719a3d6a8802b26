"""The main job over several seeds: one number of a small corpus says little.

The corpus and its splits stay; weights, order, masks, draws and dropout change with the seed. Every run
is a whole one, in `run.dir/seed-N`, with its own report; what is averaged is what their summaries say.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from langcell.config import Config
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.inference.tables import METHODS, TABLES
from langcell.recipes import pretrain
from langcell.recipes.rundir import check_free, with_absolute_paths
from langcell.recipes.session import connect

SHOWN = ("accuracy", "balanced_accuracy")


def run(config: Config) -> dict[str, Any]:
    """Run the main job for `run.seeds` seeds from `train.seed` on; a run that is whole is not run again.

    The mean and each seed's figures of every table, which also stand in `run.dir/summary.json`. Raises
    InputError where a run of a seed had other settings, and for a run directory that is a URI.
    """
    if "://" in config.run.dir:
        raise InputError(f"run.dir: {config.run.dir} is a URI; several seeds are run in a folder.")
    with connect(config.run):
        summaries = {
            seed: run_once(config, Path(config.run.dir) / f"seed-{seed}", seed)
            for seed in range(config.train.seed, config.train.seed + config.run.seeds)
        }
    result = average(summaries)
    write_whole(Path(config.run.dir) / "summary.json", json.dumps(result, indent=2))
    print(markdown(result), flush=True)
    return result


def run_once(config: Config, directory: Path, seed: int) -> dict[str, Any]:
    """The summary of the main job with this seed in `directory`; a run that is whole is not run again, one
    that was cut off goes on. Raises InputError where the run there had other settings."""
    of_seed = replace(
        config,
        run=replace(config.run, dir=str(directory), resume="auto"),
        train=replace(config.train, seed=seed),
    )
    stored = directory / "summary.json"
    if stored.exists():
        check_free(with_absolute_paths(of_seed))
    else:
        pretrain.run(of_seed)
    return json.loads(stored.read_text())


def average(summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Per table and method: the mean and the values by seed of each measure, and what they stand beside."""
    tables: dict[str, Any] = {}
    for name in TABLES:
        found = [summary["zero_shot"][name] for summary in summaries.values()]
        if any("empty" in table for table in found):
            continue
        tables[name] = {
            method: {
                measure: {
                    "mean": float(np.mean([table[method][measure] for table in found])),
                    "by_seed": [table[method][measure] for table in found],
                }
                for measure in SHOWN
            }
            for method in METHODS
        }
        first = found[0]["ct"]
        tables[name] |= {key: first[key] for key in ("n", "chance", "constant", "baseline") if key in first}
    return {"seeds": list(summaries), "zero_shot": tables}


def markdown(result: dict[str, Any]) -> str:
    """The averaged tables as a Markdown table, balanced accuracy and accuracy."""
    lines = [
        "| table | n | `ct` balanced (by seed) | `ct` accuracy | `two_step` balanced | `two_step` accuracy "
        "| best constant, balanced | logistic regression, accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, table in result["zero_shot"].items():
        ct, two_step = table["ct"], table["two_step"]
        by_seed = ", ".join(f"{value:.2f}" for value in ct["balanced_accuracy"]["by_seed"])
        baseline = f"{table['baseline']['accuracy']:.2f}" if "baseline" in table else ""
        lines.append(
            f"| `{name}` | {table['n']} | **{ct['balanced_accuracy']['mean']:.2f}** ({by_seed}) "
            f"| {ct['accuracy']['mean']:.2f} | {two_step['balanced_accuracy']['mean']:.2f} "
            f"| {two_step['accuracy']['mean']:.2f} "
            f"| {table['constant']['balanced_accuracy']:.2f} | {baseline} |"
        )
    return "\n".join(lines)
