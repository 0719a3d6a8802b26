"""The main job: a Census in, a trained, judged and exported LangCell out.

prepare -> stage 1 (cells alone) -> stage 2 (all four losses) -> export -> five zero-shot tables ->
report. Every step reads what the step before finished and named; whatever is there already is not
made again, so that a resumed job goes straight to where it stopped. What the user may have got
wrong is checked before Ray is started or before a worker is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from langcell.cells.vocabulary import Vocabulary
from langcell.config import Config, to_yaml
from langcell.corpus.manifest import Manifest, differences, library_versions
from langcell.corpus.storage import absolute, open_root, read_file
from langcell.errors import InputError
from langcell.inference.tables import TABLES, Table, plan_tables
from langcell.model.interop import cell_config, load_config, load_export, load_tokenizer, text_path
from langcell.recipes.evaluate import ContrastOnly, evaluate, joint_space, set_aside, zero_shot_summary
from langcell.recipes.export import export
from langcell.recipes.prepare import prepare_corpus
from langcell.recipes.report import write_report
from langcell.recipes.session import connect
from langcell.recipes.training import Plans, fit, make_plans
from langcell.text.ontology import Ontology
from langcell.train import metrics
from langcell.train.loop import StageTask


def run(config: Config) -> dict[str, Any]:
    """Run the main job; its summary, which also stands in `summary.json` of the run directory.

    Raises InputError before any training for what the user can mend.
    """
    config = replace(config, corpus=replace(config.corpus, dir=absolute(config.corpus.dir)))
    claim(config)
    check_text_model(config)
    directory = Path(config.run.dir).absolute()
    with connect(config.run):
        prepared = prepare_corpus(config)
        manifest = Manifest.read(config.corpus.dir)
        vocab_size = vocabulary_size(config)
        cell_config(config.model, vocab_size, config.tokens.max_length)
        plans = make_plans(manifest, config.corpus, config.train)
        aside = set_aside(config, manifest)
        plan_tables(aside.cells, Ontology.load(config.text), config.eval)
        say_plan(config, manifest, plans)
        weights = None
        for stage in (1, 2):
            task = StageTask(
                stage=stage,
                name=config.run.name or directory.name,
                run_dir=str(directory),
                plan=plans.train,
                val_plan=plans.val,
                first_step=0 if stage == 1 else config.train.stage1_epochs * plans.train.steps,
                vocab_size=vocab_size,
                cell_length=config.tokens.max_length,
                text_length=config.text.max_length,
                short_share=config.text.short_share,
                init=None if weights is None else str(weights),
                model=config.model,
                objective=config.objective,
                train=config.train,
                corpus=config.corpus,
                evaluate=ContrastOnly(
                    aside.cells, config.eval, config.text, config.model.text_init, config.objective.tau
                )
                if stage == 2
                else None,
            )
            weights = fit(task)
        assert weights is not None
    steps = (config.train.stage1_epochs + config.train.stage2_epochs) * plans.train.steps
    exported = export(config, manifest, weights, directory / "export", vocab_size=vocab_size, steps=steps)
    print("judging the exported model: five tables, contrast alone and with matching", flush=True)
    model, model_config = load_export(exported)
    tables = evaluate(config, model, model_config["tau"], aside)
    rows = metrics.read(directory / metrics.METRICS)
    summary = {
        **training_summary(rows, metrics.read(directory / metrics.RECOVERIES), config, plans),
        "zero_shot": zero_shot_summary(tables),
        "corpus": prepared,
        "export": str(exported),
    }
    report = write_report(
        directory / "report",
        title=f"langcell: {config.run.name or directory.name}",
        metrics=rows,
        tables=tables,
        joint_space=joint_space(config, model, aside, tables),
        config_yaml=to_yaml(config),
        versions=versions(),
        manifest=manifest_summary(manifest),
        summary=summary,
    )
    write_json(directory / "summary.json", summary)
    say_tables(tables)
    print(f"model    {exported}\nreport   {report}\nsummary  {directory / 'summary.json'}", flush=True)
    return summary


def claim(config: Config) -> None:
    """Take the run directory and store the resolved configuration in it.

    Raises InputError where it holds a run and `--run.resume` is not given, or where it is and the run
    that the directory holds had other settings.
    """
    directory = Path(config.run.dir)
    stored = directory / "config.yaml"
    if stored.exists() and not config.run.resume:
        raise InputError(
            f"run.dir: {directory} holds a run already. Go on with it (--run.resume true), choose another "
            "(--run.dir DIR), or delete it."
        )
    if config.run.resume and not stored.exists():
        raise InputError(f"run.resume: {directory} holds no run to go on with (config.yaml is missing).")
    if config.run.resume:
        lines = differences(_identity(yaml.safe_load(stored.read_text())), _identity(asdict(config)))
        if lines:
            raise InputError(
                f"run.resume: the run in {directory} had other settings:\n  "
                + "\n  ".join(lines)
                + "\nGo on "
                f"with its own (--config {stored}), or start another (--run.dir DIR)."
            )
    directory.mkdir(parents=True, exist_ok=True)
    stored.write_text(to_yaml(config))


def _identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run the run it is: not where it lives or what it is given to run with."""
    free = {"train": {"cpus_per_worker", "collective_timeout_s", "max_failures"}, "corpus": {"prefetch"}}
    return {
        room: {key: value for key, value in values.items() if key not in free.get(room, set())}
        for room, values in options.items()
        if room not in ("run", "eval")
    }


def check_text_model(config: Config) -> None:
    """Raises InputError where the text checkpoint or the cell checkpoint cannot be read at all."""
    text = load_config(text_path(config.model.text_init), "model.text_init")
    load_tokenizer(config.model.text_init)
    if config.text.max_length > text.max_position_embeddings:
        raise InputError(
            f"--text.max_length is {config.text.max_length}, but {config.model.text_init} has "
            f"{text.max_position_embeddings} positions."
        )
    if config.model.cell_init is not None:
        load_config(config.model.cell_init, "model.cell_init")


def vocabulary_size(config: Config) -> int:
    """Tokens of the corpus's vocabulary, `<cls>` included."""
    return Vocabulary.from_json(read_file(open_root(config.corpus.dir), "vocabulary.json")).size


def training_summary(
    rows: list[dict[str, Any]], recoveries: list[dict[str, Any]], config: Config, plans: Plans
) -> dict[str, Any]:
    """What summary.json says of the training, computed from the record of its steps."""
    batch, epochs = config.train.global_batch, config.train.stage1_epochs + config.train.stage2_epochs
    steps = {row["step"] for row in rows}
    last = {row["stage"]: row["epoch"] for row in rows}
    losses = {
        name: float(np.mean([r[name] for r in rows if r["stage"] == stage and r["epoch"] == epoch]))
        for stage, epoch in last.items()
        for name in ("mgm", "cc", "ct", "ctm")
        if name in next(r for r in rows if r["stage"] == stage)
    }
    began = {row["step"]: row["time"] for row in rows}
    return {
        "steps": len(steps),
        # Medians: the first step of a stage waits for its data tasks to start.
        "cells_per_s": float(np.median([row["cells_per_s"] for row in rows])),
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in rows])),
        "data_wait": float(np.median([row["data_wait"] for row in rows])),
        "losses": losses,
        "rows_repeated": (len(rows) - len(steps)) * batch,
        "rows_skipped": (epochs * plans.train.steps - len(steps)) * batch,
        "rows_dropped_tail": plans.train.dropped * epochs,
        "steps_replayed": sum(r["steps_replayed"] for r in recoveries),
        "recoveries_s": [began[r["step"]] - r["stopped"] for r in recoveries if r["step"] in began],
    }


def say_plan(config: Config, manifest: Manifest, plans: Plans) -> None:
    """One line on what will be trained, and on what will not be validated."""
    cells = manifest.counts["cells"]
    print(
        f"corpus   {config.corpus.dir}: {cells['train']} cells to train on, {cells['val']} val, "
        f"{cells['test']} test, {cells['held_out']} of held-out types; {plans.train.steps} steps an epoch, "
        f"{plans.train.dropped} cells of its tail dropped",
        flush=True,
    )
    if plans.val is None:
        print("         no validation loss (val has fewer cells than a global batch): the last is the best")


def say_tables(tables: dict[str, Table]) -> None:
    """The tables as the terminal shows them."""
    print(f"\n{'balanced accuracy':<18}{'ct':>8}{'two_step':>10}{'constant':>10}{'chance':>8}{'n':>6}")
    for name in TABLES:
        table = tables[name]
        if table.empty:
            print(f"{name:<18}  {table.empty}")
            continue
        ct, two_step = (table.measures(m)["balanced_accuracy"] for m in ("ct", "two_step"))
        constant = table.constant["balanced_accuracy"]
        print(
            f"{name:<18}{ct:>8.2f}{two_step:>10.2f}{constant:>10.2f}{table.chance:>8.2f}{len(table.rows):>6}"
        )
    print()


def manifest_summary(manifest: Manifest) -> dict[str, Any]:
    """What of a manifest a reader of the report wants; its thousands of blocks stay out."""
    return {
        "hash": manifest.hash,
        "recipe": manifest.recipe,
        "counts": manifest.counts,
        "beta_hash": manifest.beta_hash,
        "vocabulary_hash": manifest.vocabulary_hash,
        "ontologies": manifest.ontologies,
        "coverage": manifest.coverage,
    }


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    from importlib.metadata import version

    return library_versions() | {name: version(name) for name in ("torch", "deepspeed", "transformers")}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, path)
