"""The export: what a user of a trained model needs, and nothing of how it was trained."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import langcell
from langcell.cells.beta import Beta
from langcell.cells.vocabulary import GENEFORMER, Vocabulary
from langcell.config import Config
from langcell.corpus.manifest import Manifest
from langcell.corpus.schema import TRAIN
from langcell.corpus.texts import Texts, read_texts
from langcell.files import whole_folder
from langcell.inference.pretrained import TYPES, Pretrained
from langcell.model.interop import build_model, load_tokenizer
from langcell.model.official import LAYOUT
from langcell.recipes.card import trained_card
from langcell.recipes.rundir import run_name
from langcell.recipes.training import Trained, whole_model
from langcell.storage import open_root, read_file
from langcell.text.ontology import Ontology


def export(config: Config, manifest: Manifest, trained: Trained, directory: Path, *, vocab_size: int) -> Path:
    """Write the export into `directory`, which is whole or absent at any time; returns it.

    trained: the checkpoint that is exported. Its card has no figures yet.
    """
    model = build_model(config.model, vocab_size, config.tokens.max_length, config.train.seed)
    whole_model(trained, model)
    root = open_root(config.corpus.dir)
    ontology = Ontology.load(config.text, config.census.organism)
    made = Pretrained(
        model=model.eval(),
        tokenizer=load_tokenizer(config.model.text_init),
        vocabulary=Vocabulary.from_json(read_file(root, "vocabulary.json")),
        beta=Beta.read("beta.parquet", root),
        config={**export_config(config, manifest), "tau": trained.record.tau},
        types=trained_types(read_texts(config.corpus.dir), ontology),
        name=run_name(config),
    )
    made = replace(made, card=trained_card(made, config, manifest, trained.record))
    write_export(made, directory)
    return directory


def export_config(config: Config, manifest: Manifest) -> dict[str, Any]:
    """`config.json` of an export: what inference needs besides weights, and where they come from."""
    return {
        "langcell": langcell.__version__,
        "layout": config.export.layout,
        "projection": config.model.projection,
        "pooling": config.model.text_pooling,
        "organism": config.census.organism,
        "max_length": config.tokens.max_length,
        "text": dataclasses.asdict(config.text),
        "corpus_hash": manifest.hash,
        "beta_hash": manifest.beta_hash,
        "vocabulary_hash": manifest.vocabulary_hash,
    }


def trained_types(texts: Texts, ontology: Ontology) -> pa.Table:
    """Cell types of the training cells, in each tissue: rows of `pretrained.TYPES`.

    A tissue that the texts do not have, or that is no term, is ''.
    """

    def ids(facet: str) -> list[str]:
        found = (ontology.get(id or "") for id in texts.facet_ids.get(facet, [""] * len(texts)))
        return [term.id if term is not None else "" for term in found]

    cells: Counter[tuple[str, str, str]] = Counter()
    places = zip(texts.term, ids("tissue"), ids("tissue_general"), strict=True)
    for place, n in zip(places, texts.cells[:, TRAIN].tolist(), strict=True):
        if place[0] and n:
            cells[place] += n
    known = {term: ontology.get(term) for term, _, _ in cells}
    rows = [
        {
            "term": term,
            "label": found.label if (found := known[term]) is not None else term,
            "tissue": tissue,
            "tissue_general": general,
            "cells": n,
        }
        for (term, tissue, general), n in sorted(cells.items())
    ]
    return pa.Table.from_pylist(rows, schema=TYPES)


def write_export(model: Pretrained, directory: Path) -> None:
    """Write a model into `directory`, which is whole or absent at any time, in the layout that its
    configuration names; what stood there is replaced.

    In the released layout, the dictionaries of Geneformer that the released tokenizer reads stand beside it.
    Raises InputError for a model that the layout cannot hold.
    """
    with whole_folder(directory) as folder:
        model.save_pretrained(folder)
        if model.config.get("layout") == LAYOUT:
            _write_dictionaries(model, folder)


def _write_dictionaries(model: Pretrained, directory: Path) -> None:
    """token_dictionary.pkl and gene_median_dictionary.pkl: text to numbers and nothing else."""
    names = [*GENEFORMER["V1"], *model.vocabulary.gene_ids]
    token = model.vocabulary.tokens_of(model.beta.feature_id)
    medians = {model.beta.feature_id[i]: float(model.beta.beta[i]) for i in np.flatnonzero(token).tolist()}
    for name, content in (
        ("token_dictionary", {name: token for token, name in enumerate(names)}),
        ("gene_median_dictionary", medians),
    ):
        (directory / f"{name}.pkl").write_bytes(pickle.dumps(content))
