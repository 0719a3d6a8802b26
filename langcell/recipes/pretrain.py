"""The main job: a Census in, a trained, judged and exported LangCell out.

prepare -> stage 1 (cells alone) -> stage 2 (all four losses) -> export -> five zero-shot tables ->
report. Every step reads what the step before finished and named; whatever is there already is not
made again, so that a resumed job goes straight to where it stopped: in the middle of an epoch, with as many
workers as there are now. What the user may have got wrong is checked before Ray is started or before a worker
is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from pyarrow import fs

from langcell.cells.vocabulary import Vocabulary
from langcell.config import Config, to_yaml
from langcell.corpus.manifest import Manifest, library_versions
from langcell.corpus.text_table import tokenise_texts
from langcell.corpus.texts import read_texts
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.inference.pretrained import CARD, Pretrained
from langcell.inference.tables import TABLES, Table, plan_tables
from langcell.model.interop import (
    cell_config,
    load_config,
    load_state,
    load_tokenizer,
    text_path,
)
from langcell.model.official import LAYOUT
from langcell.objective.stages import LOSSES
from langcell.recipes.card import trained_card
from langcell.recipes.export import export
from langcell.recipes.prepare import prepare_corpus
from langcell.recipes.report import write_report
from langcell.recipes.rundir import (
    check_free,
    outputs,
    place_in,
    run_name,
    run_root,
    take,
    with_absolute_paths,
)
from langcell.recipes.session import connect
from langcell.recipes.stopping import Stopping
from langcell.recipes.tables import (
    Aside,
    ContrastOnly,
    evaluate,
    joint_space,
    set_aside,
    zero_shot_summary,
)
from langcell.recipes.training import Plans, fit, make_plans
from langcell.storage import open_root, read_file, write_file
from langcell.text.ontology import Ontology
from langcell.train import metrics, trace, trackers
from langcell.train.task import StageTask
from langcell.train.trackers import Tracking


def run(config: Config) -> dict[str, Any]:
    """Run the main job; its summary, which also stands in `summary.json` of the run directory.

    Raises InputError before any training for what the user can mend.
    """
    config = with_absolute_paths(config)
    check_free(config)
    check_models(config)
    trackers.check(config.run.trackers)
    stopping = Stopping()
    with connect(config.run), stopping.install():
        prepared = prepare_corpus(config)
        manifest = Manifest.read(config.corpus.dir)
        vocab_size = vocabulary_size(config)
        cell_config(config.model, vocab_size, config.tokens.max_length)
        plans = make_plans(manifest, config.corpus, config.train)
        aside = set_aside(config, manifest)
        plan_tables(aside.cells, Ontology.load(config.text), config.eval)
        texts_cut = count_cut(config)
        say_plan(config, manifest, plans, texts_cut)
        job = take(config)
        tasks = stage_tasks(config, plans, vocab_size, aside, job)
        first = fit(tasks[0], stopping)
        trained = fit(replace(tasks[1], init=first.name), stopping)
        with outputs(config) as directory:
            place = export(config, manifest, trained, directory / "export", vocab_size=vocab_size)
            print("judging the exported model: five tables, contrast alone and with matching", flush=True)
            exported = Pretrained.from_pretrained(place)
            tables = evaluate(config, exported.model, exported.tau, aside)
            write_whole(place / CARD, trained_card(exported, config, manifest, trained.record, tables))
            root = run_root(config)
            rows = metrics.read(root, metrics.METRICS)
            summary = {
                **training_summary(root, rows, tasks),
                "texts_cut": texts_cut,
                "zero_shot": zero_shot_summary(tables),
                "corpus": prepared,
                "export": place_in(config, "export"),
            }
            write_report(
                directory / "report",
                title=f"langcell: {run_name(config)}",
                metrics=rows,
                tables=tables,
                joint_space=joint_space(config, exported.model, aside, tables),
                config_yaml=to_yaml(config),
                versions=versions(),
                manifest=manifest_summary(manifest),
                summary=summary,
            )
        write_file(root, "summary.json", json.dumps(summary, indent=2).encode())
    say_tables(tables)
    names = {"model": "export", "report": "report/index.html", "summary": "summary.json"}
    print("\n".join(f"{what:<8} {place_in(config, name)}" for what, name in names.items()), flush=True)
    return summary


def stage_tasks(
    config: Config, plans: Plans, vocab_size: int, aside: Aside, job: str
) -> tuple[StageTask, StageTask]:
    """What the workers of both stages are told; stage 2 is yet to be given the result of stage 1."""
    first = StageTask(
        stage=1,
        name=run_name(config),
        run_dir=config.run.dir,
        plan=plans.train,
        val_plan=plans.val,
        first_step=0,
        vocab_size=vocab_size,
        cell_length=config.tokens.max_length,
        text_length=config.text.max_length,
        short_share=config.text.short_share,
        init=None,
        model=config.model,
        objective=config.objective,
        train=config.train,
        corpus=config.corpus,
        evaluate=None,
        job=job,
        tracking=Tracking(config.run.trackers, run_name(config), asdict(config)),
    )
    judged = ContrastOnly(aside.cells, config.eval, config.text, config.model.text_init, config.objective.tau)
    return first, replace(first, stage=2, first_step=first.last_step, evaluate=judged)


def check_models(config: Config) -> None:
    """Raises InputError where the text checkpoint or the cell checkpoint cannot be read, or where the layout
    of the export cannot hold the model."""
    if config.export.layout == LAYOUT and config.model.text_pooling != "cls":
        raise InputError(
            f"--export.layout {LAYOUT}: the released code projects the state of [CLS] alone; it goes with "
            f"--model.text_pooling cls, not {config.model.text_pooling}."
        )
    text = load_config(text_path(config.model.text_init), "model.text_init")
    load_tokenizer(config.model.text_init)
    if config.text.max_length > text.max_position_embeddings:
        raise InputError(
            f"--text.max_length is {config.text.max_length}, but {config.model.text_init} has "
            f"{text.max_position_embeddings} positions."
        )
    load_state(text_path(config.model.text_init), "model.text_init")
    if config.model.cell_init is not None:
        load_config(config.model.cell_init, "model.cell_init")
        load_state(config.model.cell_init, "model.cell_init")


def vocabulary_size(config: Config) -> int:
    """Tokens of the corpus's vocabulary, `<cls>` included."""
    return Vocabulary.from_json(read_file(open_root(config.corpus.dir), "vocabulary.json")).size


def training_summary(
    root: fs.FileSystem, rows: list[dict[str, Any]], tasks: tuple[StageTask, StageTask]
) -> dict[str, Any]:
    """What summary.json says of the training, computed from the records of its steps and of its cells."""
    steps = {row["step"] for row in rows}
    last = {row["stage"]: row["epoch"] for row in rows}
    losses = {
        name: float(
            np.mean(
                [r[name] for r in rows if (r["stage"], r["epoch"]) == (stage, epoch) and r[name] is not None]
            )
        )
        for stage, epoch in last.items()
        for name in LOSSES[stage]
    }
    counted = [
        trace.audit(
            root,
            task.stage,
            task.first_step,
            task.plan.steps,
            task.epochs,
            task.plan.steps * task.plan.global_batch,
        )
        for task in tasks
    ]
    repeated, skipped = map(sum, zip(*counted, strict=True))
    recoveries = metrics.read(root, metrics.RECOVERIES)
    return {
        "steps": len(steps),
        # Medians: the first step of a stage waits for its data tasks to start.
        "cells_per_s": float(np.median([row["cells_per_s"] for row in rows])),
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in rows])),
        "data_wait": float(np.median([row["data_wait"] for row in rows])),
        "mfu": float(np.median(mfus)) if (mfus := [row["mfu"] for row in rows if row.get("mfu")]) else None,
        "losses": losses,
        "rows_repeated": repeated,
        "rows_skipped": skipped,
        "rows_dropped_tail": sum(task.plan.dropped * task.epochs for task in tasks),
        "steps_skipped": sum(
            max((r["skipped"] for r in rows if r["stage"] == task.stage), default=0) for task in tasks
        ),
        "steps_replayed": sum(r["steps_replayed"] for r in recoveries),
        "recoveries_s": [
            r["resumed"] - r["stopped"]
            for r in recoveries
            if "resumed" in r  # one at a stage's very end came to no step
        ],
    }


def count_cut(config: Config) -> int:
    """Distinct full texts of the corpus that are longer than `text.max_length` and are cut there."""
    full = [variants[0] for variants in read_texts(config.corpus.dir).variants]
    _, cut = tokenise_texts(full, load_tokenizer(config.model.text_init), config.text.max_length)
    return int(cut.sum())


def say_plan(config: Config, manifest: Manifest, plans: Plans, texts_cut: int) -> None:
    """What will be trained, what is cut, and what will not be validated."""
    cells = manifest.counts["cells"]
    print(
        f"corpus   {config.corpus.dir}: {cells['train']} cells to train on, {cells['val']} val, "
        f"{cells['test']} test, {cells['held_out']} of held-out types; {plans.train.steps} steps an epoch, "
        f"{plans.train.dropped} cells of its tail dropped; {texts_cut} of {manifest.counts['texts']} texts "
        f"cut at {config.text.max_length} tokens",
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
