"""The export: what a user of a trained model needs, and nothing of how it was trained."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import langcell
from langcell.config import Config
from langcell.corpus.manifest import Manifest
from langcell.model.interop import build_model, load_tokenizer, save_export
from langcell.recipes.rundir import run_name
from langcell.recipes.training import Trained, whole_model
from langcell.storage import open_root, read_file

CARD = """---
license: mit
library_name: langcell
---
# {name}

A LangCell model: a cell encoder and a text encoder with one joint space, and a matching head that
reads a cell and a text together. It scores candidate texts for a cell without labels; it writes no
text and holds no dialogue.

- corpus: {cells} cells ({corpus_hash}), {uri}
- held out of training: {held_out}
- trained for {steps} steps of {batch} cells, seed {seed}
- gene vocabulary and beta (the non-zero medians) belong to the weights: `vocabulary.json`,
  `beta.parquet`; a cell tokenised with other medians is another sentence.
- definitions: {ontologies} (OBO Foundry; see their licences)
"""


def export(config: Config, manifest: Manifest, trained: Trained, directory: Path, *, vocab_size: int) -> Path:
    """Write the export into `directory`, which is whole or absent at any time; returns it.

    trained: the checkpoint that is exported.
    """
    model = build_model(config.model, vocab_size, config.tokens.max_length, config.train.seed)
    whole_model(trained, model)
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_export(
        model.eval(),
        temporary,
        load_tokenizer(config.model.text_init),
        {**export_config(config, manifest), "tau": trained.record.tau},
    )
    root = open_root(config.corpus.dir)
    for name in ("vocabulary.json", "beta.parquet"):
        (temporary / name).write_bytes(read_file(root, name))
    (temporary / "README.md").write_text(
        CARD.format(
            name=run_name(config),
            cells=manifest.cells,
            corpus_hash=manifest.hash[:12],
            uri=config.census.uri or f"CELLxGENE Census {config.census.version}",
            held_out=", ".join(config.eval.held_out_types) or "nothing",
            steps=trained.record.cursor.global_step,
            batch=config.train.global_batch,
            seed=config.train.seed,
            ontologies=", ".join(f"{k} {v}" for k, v in manifest.ontologies.items()),
        )
    )
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        os.replace(directory, old)
    os.replace(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)
    return directory


def export_config(config: Config, manifest: Manifest) -> dict[str, Any]:
    """`config.json` of an export: what inference needs besides weights, and where they come from."""
    return {
        "langcell": langcell.__version__,
        "projection": config.model.projection,
        "pooling": config.model.text_pooling,
        "organism": config.census.organism,
        "max_length": config.tokens.max_length,
        "text": dataclasses.asdict(config.text),
        "corpus_hash": manifest.hash,
        "beta_hash": manifest.beta_hash,
        "vocabulary_hash": manifest.vocabulary_hash,
    }
