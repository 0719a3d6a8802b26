"""Labelled cells of an .h5ad file, as sentences of a model, with their split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import anndata
import numpy as np
import pandas as pd
import torch

from langcell.batch import Packed
from langcell.cells.symbols import read_symbols
from langcell.errors import InputError
from langcell.inference.annotate import counts_of
from langcell.inference.pretrained import Pretrained
from langcell.recipes.labels import Labels, Split, read_labels, split_cells
from langcell.recipes.options import FinetuneOptions
from langcell.storage import absolute


@dataclass(frozen=True)
class Study:
    """Labelled cells: sentences, labels and split; names: of the cells; left_out: how many and why."""

    cells: Packed
    labels: Labels
    split: Split
    names: pd.Index
    left_out: dict[str, int]

    def part(self, rows: np.ndarray) -> tuple[Packed, torch.Tensor]:
        """Sentences and targets of some cells."""
        return self.cells.select(torch.from_numpy(rows)), self.labels.targets(rows)


def read_study(asked: FinetuneOptions, model: Pretrained, seed: int) -> Study:
    """The labelled cells of the file. Raises InputError for a file, labels or a split that cannot be used."""
    if asked.data is None:
        raise InputError(
            "finetune.data: no file is given; an .h5ad file with raw counts and labels is needed"
        )
    try:
        adata = anndata.read_h5ad(absolute(asked.data), backed="r")
    except Exception as error:  # what is no .h5ad file raises whatever its parts run into
        raise InputError(f"finetune.data: {asked.data} cannot be read as .h5ad: {error}") from error
    try:
        read_labels(adata.obs, asked.target, asked.kind)  # before minutes of reading
        symbols = read_symbols(asked.symbols, "finetune.symbols") if asked.symbols else None
        counts = counts_of(adata, model, asked.layer, symbols)
        try:
            cells = counts.sentences(0, counts.n)
        except OverflowError as error:
            raise InputError(f"finetune.data: {error}; take a part of the {counts.n:,} cells") from error
        speaking = np.flatnonzero(~counts.empty_N)
        obs = adata.obs.iloc[speaking]
    finally:
        adata.file.close()
    labels = read_labels(obs, asked.target, asked.kind)
    split = split_cells(
        labels,
        obs,
        asked.split_by,
        test_share=asked.test_share,
        # Of few shots no others choose the epoch, but for those that a column of the file sets aside.
        val_share=0.0 if asked.shots is not None else asked.val_share,
        seed=seed,
        option="finetune.split_by",
    )
    left_out = {"no gene of the model's vocabulary": int(counts.empty_N.sum())}
    if asked.shots is not None:
        split = _few(labels, split, asked.shots, seed)
    if asked.kind == "classification":
        labels, split = labels.learnt(split)
    left_out |= split.left_out
    labels = labels.standardised_by(split.train)
    chosen = cells.select(torch.from_numpy(speaking)) if len(speaking) < counts.n else cells
    return Study(chosen, labels, split, obs.index, {why: n for why, n in left_out.items() if n})


def _few(labels: Labels, split: Split, shots: int, seed: int) -> Split:
    if labels.head.kind != "classification":
        raise InputError(
            "finetune.shots: a number of cells of each class; a classification alone has classes"
        )
    rows = np.random.default_rng(seed).permutation(split.train)
    of = labels.value[rows]
    train = np.sort(np.concatenate([rows[of == one][:shots] for one in np.unique(of)]))
    return replace(split, train=train, rule=f"{split.rule}; {shots} training cells of each class at most")
