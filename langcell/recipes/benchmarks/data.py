"""The cells that a model is evaluated on, and nothing that it was trained on.

A file of one's own is taken as it is: nobody but its owner can know whether the model has seen it, and the
summary says so. The embedded cells are the ones that the demo trained on, so only those of its corpus's
`test` and `held_out` splits are taken. What the parts need of a cell is made once: its sentence, its
embedding, its log-normalised counts, its term in every facet.

Shape suffixes: N cells, G genes of the file, P width of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import yaml

from langcell.batch import Packed
from langcell.cells.symbols import read_symbols
from langcell.census.demo import demo_adata
from langcell.corpus.blocks import sample_cells
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from langcell.inference.baseline import log_features
from langcell.inference.clustering import principal_components
from langcell.inference.counts import Counts
from langcell.inference.embed import embed_cells
from langcell.inference.facets import Facet, resolve
from langcell.inference.pretrained import Pretrained
from langcell.recipes.options import EvaluateOptions
from langcell.storage import absolute

DEMO = "demo"
DEMO_CORPUS = "runs/demo-corpus"
JOINID = "soma_joinid"


@dataclass(frozen=True, eq=False)
class Cohort:
    """N cells.

    obs, var: of the cells and of the genes of their counts; label_N: cell types as the file has them, '' for
    none; facets: by facet, `cell_type` first; packed: sentences; z_NP: float32, of unit length; features_NG:
    log-normalised counts (float64); about: for the summary, where they come from and what was left out, cells
    without a count in the model's genes (`silent_cells`) among it.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    label_N: np.ndarray
    facets: dict[str, Facet]
    packed: Packed
    z_NP: np.ndarray
    features_NG: sp.csr_matrix
    about: dict[str, Any]

    @cached_property
    def spaces(self) -> dict[str, np.ndarray]:
        """The spaces that are compared: embedding and principal components, float [N, ...]."""
        return {"X_langcell": self.z_NP, "X_pca": principal_components(self.features_NG)}

    def column(self, name: str, option: str) -> pd.Series:
        """A column of obs. Raises InputError, naming the option, where there is none."""
        if name not in self.obs:
            raise InputError(_no_column(name, option, self.obs))
        return self.obs[name]


def read_cohort(asked: EvaluateOptions, model: Pretrained) -> Cohort:
    """Read, choose and prepare the cells. Raises InputError for what the user can mend."""
    adata, about = _read(asked, model)
    symbols = read_symbols(asked.symbols, "evaluate.symbols") if asked.symbols else None
    given = _terms(asked.terms)
    columns = {"cell_type": asked.label, **asked.facets}
    for facet, column in columns.items():
        if column not in adata.obs:
            option = "label" if facet == "cell_type" else f"facets.{facet}"
            raise InputError(_no_column(column, option, adata.obs))
    counts = Counts.of(
        adata,
        model.vocabulary,
        model.beta,
        organism=model.organism,
        max_length=model.max_length,
        layer=asked.layer,
        symbols=symbols,
    )
    packed = counts.sentences(0, counts.n)
    silent = int(counts.empty_N.sum())
    if silent == counts.n:
        raise InputError(f"evaluate.data: no cell of {asked.data} has a count in the model's genes")
    if silent:
        speaking = np.flatnonzero(~counts.empty_N)
        adata, packed = adata[speaking].copy(), packed.select(torch.from_numpy(speaking))
    facets = {}
    for facet, column in columns.items():
        beside = f"{column}_ontology_term_id"
        ids = adata.obs[beside].tolist() if beside in adata.obs else None
        facets[facet] = resolve(facet, adata.obs[column].tolist(), ids, given, model.ontology)
    matrix, var = _matrix(adata, asked.layer)
    totals = np.asarray(matrix.sum(1)).ravel()
    if "raw_sum" in adata.obs:
        totals = adata.obs["raw_sum"].fillna(pd.Series(totals, adata.obs_names)).to_numpy(np.float64)
    return Cohort(
        obs=adata.obs,
        var=var,
        label_N=adata.obs[asked.label].astype(object).where(adata.obs[asked.label].notna(), "").to_numpy(str),
        facets=facets,
        packed=packed,
        z_NP=embed_cells(model.model, packed, asked.batch_tokens).numpy(),
        features_NG=log_features(matrix, totals),
        about={
            **about,
            "cells": len(packed),
            "silent_cells": silent,
            "genes": counts.genes,
            "naming": counts.naming,
        },
    )


def _read(asked: EvaluateOptions, model: Pretrained) -> tuple[anndata.AnnData, dict[str, Any]]:
    """The chosen cells in memory, and what was left out."""
    if asked.data == DEMO:
        adata = demo_adata()
    else:
        try:
            adata = anndata.read_h5ad(absolute(asked.data), backed="r")
        except Exception as error:  # what is no .h5ad file raises whatever its parts run into
            raise InputError(f"evaluate.data: {asked.data} cannot be read as .h5ad: {error}") from error
    corpus = asked.corpus or (DEMO_CORPUS if asked.data == DEMO else None)
    rows = np.arange(adata.n_obs)
    if corpus is None:
        seen = "nothing was left out: whether the model was trained on some of these cells is not known here"
    else:
        rows = _unseen(adata.obs, corpus, model)
        seen = f"cells of the training and validation splits of {corpus}"
    about = {
        "data": asked.data,
        "cells_given": adata.n_obs,
        "left_out": seen,
        "left_out_cells": adata.n_obs - len(rows),
    }
    if len(rows) > asked.max_cells:
        rows = np.sort(np.random.default_rng(asked.seed).choice(rows, asked.max_cells, replace=False))
    about["cells"] = len(rows)
    if not len(rows):
        raise InputError(f"evaluate.data: {asked.data} has no cell to evaluate; left out: {seen}")
    chosen = adata[rows].to_memory()
    if adata.isbacked:
        adata.file.close()
    return chosen, about


def _unseen(obs: pd.DataFrame, corpus: str, model: Pretrained) -> np.ndarray:
    """Rows whose cells no step of the training has read."""
    if JOINID not in obs:
        raise InputError(
            f"evaluate.corpus: obs has no column {JOINID}, by which the cells of {corpus} are known. Leave "
            "the option out for cells that the corpus does not hold"
        )
    if "finetuned" in model.config:
        raise InputError(
            f"evaluate.corpus: {model.name} was fine-tuned after it was trained on {corpus}, and on which "
            "cells its files do not say. Evaluate it on a file that it has not seen (evaluate.data), without "
            "a corpus"
        )
    manifest = Manifest.read(corpus)
    stated = model.config.get("corpus_hash", manifest.hash)
    if stated != manifest.hash:
        raise InputError(
            f"evaluate.corpus: {model.name} was trained on another corpus ({stated[:12]}) than {corpus} "
            f"({manifest.hash[:12]}), which cells it has seen cannot be told"
        )
    aside = [
        sample_cells(corpus, manifest, split, manifest.cells, 0, (JOINID,))[JOINID].to_numpy()
        for split in ("test", "held_out")
    ]
    return np.flatnonzero(np.isin(obs[JOINID].to_numpy(), np.concatenate(aside)))


def _matrix(adata: anndata.AnnData, layer: str | None) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """The raw counts that `Counts` has found right, with the genes of their columns."""
    if layer == "raw" and adata.raw is not None:
        return sp.csr_matrix(adata.raw.X, dtype=np.float64), adata.raw.var
    return sp.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float64), adata.var


def _terms(path: str | None) -> Mapping[str, str]:
    """Ontology ids of labels from a YAML file."""
    if path is None:
        return {}
    try:
        with open(path) as file:
            terms = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"evaluate.terms: {path} cannot be read: {error}") from error
    if not isinstance(terms, dict) or not all(isinstance(x, str) for pair in terms.items() for x in pair):
        raise InputError(f"evaluate.terms: {path} must map labels to ontology ids (`CD19+ B: CL:0000236`)")
    return terms


def _no_column(name: str, option: str, obs: pd.DataFrame) -> str:
    return f"evaluate.{option}: obs has no column {name}; it has: {', '.join(map(str, obs.columns))}"
