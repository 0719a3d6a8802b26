"""What each part of the objective is worth: runs of the main job with one of them left out, as one Ray Tune
sweep over variants and seeds.

A run of the demo is small and its figures are noisy (0.59 to 0.67 for `seen` over three seeds), so no
variant is read without its spread: the table shows mean and range. Runs share the prepared corpus, train
one after another unless told otherwise, and one that is whole is not run again, so that a sweep that was
cut off goes on.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from langcell.config import AblationConfig, Config
from langcell.errors import InputError, RunError
from langcell.files import write_whole
from langcell.inference.tables import METHODS, TABLES
from langcell.objective.options import ObjectiveOptions
from langcell.recipes.prepare import prepare_corpus
from langcell.recipes.rundir import with_absolute_paths
from langcell.recipes.seeds import average, run_once
from langcell.recipes.session import connect


def vary(objective: ObjectiveOptions, variant: str) -> ObjectiveOptions:
    """The objective of a variant. Raises InputError for one that is not known."""
    if variant == "all":
        return objective
    if variant == "paper":
        return replace(objective, preset="paper")
    if variant == "mgm_view":
        return replace(objective, mgm_view="own" if objective.mgm_view == "shared" else "shared")
    if variant == "ctm_mining":
        return replace(objective, ctm_mining="exact" if objective.ctm_mining == "balanced" else "balanced")
    left_out: dict[str, Any] = {f"w_{variant.removeprefix('no_')}": 0.0}
    if variant.startswith("no_") and left_out.keys() <= vars(objective).keys():
        return replace(objective, **left_out)
    raise InputError(
        f"ablation.variants: {variant} is not known; all, no_mgm, no_cc, no_ct, no_ctm, paper, mgm_view and "
        "ctm_mining are"
    )


def run(config: AblationConfig) -> dict[str, Any]:
    """Run every variant for `run.seeds` seeds; the averaged tables, which also stand in summary.json and, to
    read, in tables.md of `run.dir`.

    Raises InputError for what the user can mend, RunError where a run failed.
    """
    if "://" in config.run.dir:
        raise InputError(f"run.dir: {config.run.dir} is a URI; a sweep is run in a folder.")
    base = with_absolute_paths(
        Config(**{name: value for name, value in vars(config).items() if name != "ablation"})
    )
    variants = {name: vary(base.objective, name) for name in config.ablation.variants}
    directory, seeds = Path(base.run.dir), range(base.train.seed, base.train.seed + base.run.seeds)

    def trial(chosen: dict[str, Any]) -> dict[str, Any]:
        name, seed = chosen["variant"], chosen["seed"]
        run_once(replace(base, objective=variants[name]), directory / name / f"seed-{seed}", seed)
        return {"done": 1}

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with connect(base.run):
        prepare_corpus(base)
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 0.1}),  # its workers ask for their own
            param_space={"variant": tune.grid_search(list(variants)), "seed": tune.grid_search(list(seeds))},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.ablation.concurrent),
            run_config=tune.RunConfig(name="tune", storage_path=str(directory), verbose=0),
        )
        results = tuner.fit()
    if results.num_errors:
        raise RunError(
            f"{results.num_errors} of {len(results)} runs failed; the same command goes on with those "
            f"that are missing. The first: {results.errors[0]}"
        )
    found = {name: average(_summaries(directory / name, seeds)) for name in variants}
    result = {"seeds": list(seeds), "variants": found}
    write_whole(directory / "summary.json", json.dumps(result, indent=2))
    write_whole(directory / "tables.md", markdown(result))
    print(markdown(result), f"summary  {directory / 'summary.json'}", sep="\n", flush=True)
    return result


def _summaries(directory: Path, seeds: range) -> dict[int, dict[str, Any]]:
    return {seed: json.loads((directory / f"seed-{seed}" / "summary.json").read_text()) for seed in seeds}


def markdown(result: dict[str, Any]) -> str:
    """Balanced accuracy by variant, table and method: mean over the seeds, and their range."""
    columns = [
        (table, method)
        for table in TABLES
        for method in METHODS
        if all(table in found["zero_shot"] for found in result["variants"].values())
    ]
    lines = [
        "| variant | " + " | ".join(f"`{table}` {method}" for table, method in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, found in result["variants"].items():
        cells = []
        for table, method in columns:
            if (name, method) == ("no_ctm", "two_step"):
                cells.append("-")  # its matching head was never trained
                continue
            measured = found["zero_shot"][table][method]["balanced_accuracy"]
            low, high = min(measured["by_seed"]), max(measured["by_seed"])
            cells.append(f"{measured['mean']:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
