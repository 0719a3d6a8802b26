"""The model card of an export: what it is, what it was made of, how well it does, where it ends.

Written twice: without figures when the export is, so that no export is ever without a card, and once more
when the exported model has been judged. Places of this machine stay out of it: a local folder is named by its
last part. Licences of ontologies are those of the OBO Foundry's registry, and EFO's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from langcell.config import Config
from langcell.corpus.manifest import Manifest
from langcell.inference.pretrained import Pretrained
from langcell.inference.tables import Table
from langcell.recipes.report import MEANING
from langcell.recipes.rundir import run_name
from langcell.text.describe import ONTOLOGIES_OF
from langcell.train.store import Record

LICENCES = {
    "CL": "CC BY 4.0",
    "EFO": "Apache-2.0",
    "HsapDv": "CC BY 3.0",
    "MmusDv": "CC BY 3.0",
    "UBERON": "CC BY 3.0",
    "MONDO": "CC BY 4.0",
    "PATO": "CC BY 3.0",
    "HANCESTRO": "CC BY 4.0",
}
"""Licence of each of `releases.ONTOLOGIES`."""
START_LICENCES = {
    "minilm": "Apache-2.0",
    "biomedbert": "MIT",
    "pubmedbert": "MIT",
    "geneformer": "Apache-2.0",
}
"""Licence of weights to start from, by a word of their name, as their authors publish them."""
TAGS = ["langcell", "biology", "single-cell", "transcriptomics", "cell-type-annotation"]


def trained_card(
    model: Pretrained,
    config: Config,
    manifest: Manifest,
    record: Record,
    tables: Mapping[str, Table] | None = None,
) -> str:
    """The card (Markdown) of a model that was trained here.

    record: of the checkpoint that was exported; tables: the five zero-shot tables, None before they are
    there.
    """
    cells, options = manifest.counts["cells"], config.model
    rows = [_row(table) for table in (tables or {}).values()]
    epochs = f"{config.train.stage1_epochs} + {config.train.stage2_epochs}"
    return _render(
        model,
        name=run_name(config),
        front={"license": "mit", **_results(run_name(config), rows)},
        converted=None,
        corpus={
            "cells": manifest.cells,
            "train": cells["train"],
            "splits": ", ".join(f"{n:,} {split}" for split, n in cells.items()),
            "source": _source(config),
            "filter": config.census.filter,
            "hash": manifest.hash,
            "texts": manifest.counts["texts"],
            "facets": ", ".join(config.text.facets),
            "held_out": ", ".join(map(str, config.eval.held_out_types + config.eval.held_out_datasets)),
        },
        training={
            "steps": record.cursor.global_step,
            "epochs": epochs,
            "batch": config.train.global_batch,
            "seed": config.train.seed,
            "preset": config.objective.preset,
            "tau": record.tau,
            "cell_init": f"from {_named(options.cell_init)}" if options.cell_init else "from scratch",
            "text_init": f"from {_named(options.text_init)}",
            "pooling": options.text_pooling,
            "text_train": options.text_train,
        },
        beta_source=f"of {_named(config.beta.source)}" if config.beta.source else "of the training cells",
        tables=rows,
        top_k=config.eval.top_k,
        a=config.eval.a,
        licences=_licences(config, manifest),
    )


def converted_card(model: Pretrained, source: str) -> str:
    """The card (Markdown) of released weights that were converted; source: what their folder is called."""
    return _render(
        model,
        name=model.name,
        front={"license": "unknown"},
        converted={"source": source},
        corpus=None,
        training=None,
        beta_source=model.beta.metadata.get("method", "as they were given"),
        tables=[],
        top_k=None,
        a=None,
        licences=[
            "weights, vocabulary and medians: see their source",
            "definitions of candidate terms: their ontology's, such as CL "
            f"({LICENCES['CL']}) and UBERON ({LICENCES['UBERON']})",
        ],
    )


def tuned_card(base: Pretrained, how: str, *, classifies: bool) -> str:
    """The card (Markdown) of a fine-tuned model: its own part, then the card of the model that it comes of,
    whose figures are no longer in the front matter.

    how: method, cells and measures, in words; classifies: whether it is a LangCell-CE.
    """
    given = ModelCard(base.card, ignore_metadata_errors=True)
    front = {name: value for name, value in given.data.to_dict().items() if name != "model-index"}
    return (
        _environment()
        .get_template("tuned.md.jinja")
        .render(
            front=yaml.safe_dump(front or {"library_name": "langcell"}, sort_keys=False),
            name=base.name,
            how=how,
            classifies=classifies,
            given=given.text.strip(),
        )
    )


def _render(model: Pretrained, *, front: dict[str, Any], **facts: Any) -> str:
    about = {"library_name": "langcell", "language": "en", "tags": TAGS}
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(
            front=yaml.safe_dump({**about, **front}, sort_keys=False),
            organism=model.organism,
            genes=len(model.vocabulary.gene_ids),
            vocabulary_hash=model.vocabulary.hash,
            beta_hash=model.beta.hash,
            max_length=model.max_length,
            text_length=model.text.max_length,
            types=len(model.known_types()),
            **facts,
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("langcell.recipes", ""),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _row(table: Table) -> dict[str, Any]:
    if table.empty:
        return {"name": table.name, "empty": table.empty}
    ct, two_step = (table.measures(method)["balanced_accuracy"] for method in ("ct", "two_step"))
    return {
        "name": table.name,
        "empty": "",
        "n": len(table.rows),
        "ct": ct,
        "two_step": two_step,
        "constant": table.constant["balanced_accuracy"],
        "chance": table.chance,
        "meaning": MEANING[table.name],
    }


def _results(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures as Hugging Face's front matter has them."""
    results = [
        {
            "task": {"type": "zero-shot-classification", "name": "zero-shot annotation of cells"},
            "dataset": {"type": row["name"], "name": f"cells kept aside ({row['name']}, n = {row['n']})"},
            "metrics": [
                {"type": "balanced_accuracy", "name": f"balanced accuracy ({method})", "value": row[method]}
                for method in ("ct", "two_step")
            ],
        }
        for row in rows
        if not row["empty"]
    ]
    return {"model-index": [{"name": name, "results": results}]} if results else {}


def _named(place: str | None) -> str:
    """A URI, a Hub id or the last part of a local path, as code."""
    local = place is not None and "://" not in place and Path(place).is_absolute()
    return f"`{Path(str(place)).name if local else place}`"


def _source(config: Config) -> str:
    if config.census.uri is None:
        return f"CELLxGENE Census {config.census.version}"
    if config.census.uri == "demo":
        return "the embedded demo: 700 blood cells (10x Genomics Fresh 68k PBMCs, as scanpy ships them)"
    return _named(config.census.uri)


def _licences(config: Config, manifest: Manifest) -> list[str]:
    census = config.census.uri is None
    lines = [f"cells: {_source(config)}: {'CC BY 4.0' if census else 'see their source'}"]
    used = {name for facet in config.text.facets for name in ONTOLOGIES_OF[facet]}
    lines += [
        f"names and definitions: {name} {release}: {LICENCES[name]}"
        for name, release in manifest.ontologies.items()
        if name in used
    ]
    for what, init in (("cell", config.model.cell_init), ("text", config.model.text_init)):
        if init is not None:
            known = (licence for word, licence in START_LICENCES.items() if word in _named(init).lower())
            lines.append(f"start of the {what} encoder: {_named(init)}: {next(known, 'see its source')}")
    return lines
