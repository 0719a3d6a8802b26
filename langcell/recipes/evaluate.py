"""The five zero-shot tables of a model, from the cells that a corpus kept aside."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from langcell.batch import Packed
from langcell.census.slices import Source, make_slices
from langcell.census.source import open_source
from langcell.census.tokenised import TokenisedFolder
from langcell.config import Config
from langcell.corpus.blocks import sample_cells
from langcell.corpus.manifest import Manifest
from langcell.corpus.schema import SPLITS, TRAIN
from langcell.corpus.texts import read_texts
from langcell.inference.baseline import log_features, logistic_regression
from langcell.inference.embed import embed_cells, embed_texts
from langcell.inference.figures import JointSpace
from langcell.inference.options import EvalOptions
from langcell.inference.tables import EvalCells, Table, zero_shot_tables
from langcell.model.interop import load_tokenizer
from langcell.model.langcell import LangCell
from langcell.text.describe import candidate
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

Counts = tuple[sp.csr_matrix, np.ndarray]


@dataclass(frozen=True)
class Aside:
    """Cells for judging, with the joinids by which their counts are found again."""

    cells: EvalCells
    soma_joinid_N: np.ndarray
    train: pa.Table
    """Training cells for the supervised baseline: soma_joinid and term."""


def set_aside(config: Config, manifest: Manifest) -> Aside:
    """Seeded samples of the test, held-out and training cells of the corpus."""

    def sample(split: str, *columns: str) -> pa.Table:
        return sample_cells(
            config.corpus.dir, manifest, split, config.eval.max_cells, config.corpus.split_seed, columns
        )

    splits = ("test", "held_out")
    tables = [sample(split, "soma_joinid", "term", "tokens") for split in splits]
    cells = pa.concat_tables(tables).combine_chunks()
    tokens = cells["tokens"].combine_chunks()
    texts = read_texts(config.corpus.dir)
    trained = {term for term, n in zip(texts.term, texts.cells[:, TRAIN], strict=True) if n and term}
    return Aside(
        EvalCells(
            packed=Packed.from_offsets(tokens.values.to_numpy(), tokens.offsets.to_numpy()),
            term=cells["term"].to_pylist(),
            split=[name for name, table in zip(splits, tables, strict=True) for _ in range(len(table))],
            train_types=sorted(trained),
            text_terms=trained,
        ),
        cells["soma_joinid"].to_numpy(),
        sample(SPLITS[TRAIN], "soma_joinid", "term"),
    )


@dataclass(frozen=True)
class ContrastOnly:
    """The `ct` figures of a model in training: the function that the training loop is handed."""

    cells: EvalCells
    options: EvalOptions
    text: TextOptions
    text_init: str
    tau: float

    def __call__(self, model: LangCell) -> dict[str, float]:
        """Balanced accuracy of each table that has cells."""
        tables = zero_shot_tables(
            model,
            load_tokenizer(self.text_init),
            self.cells,
            Ontology.load(self.text),
            self.options,
            tau=self.tau,
            max_length=self.text.max_length,
            two_step=False,
        )
        return {
            name: table.measures("ct")["balanced_accuracy"]
            for name, table in tables.items()
            if not table.empty
        }


def evaluate(config: Config, model: LangCell, tau: float, aside: Aside) -> dict[str, Table]:
    """The five tables with both scores, `seen` beside logistic regression on the same cells' counts."""
    tables = zero_shot_tables(
        model,
        load_tokenizer(config.model.text_init),
        aside.cells,
        Ontology.load(config.text),
        config.eval,
        tau=tau,
        max_length=config.text.max_length,
        two_step=True,
    )
    seen = tables["seen"]
    if seen.empty:
        return tables
    known = aside.train.filter(pc.not_equal(aside.train["term"], ""))
    with closing(open_source(config.census)) as source:
        if isinstance(source, TokenisedFolder):  # of sentences alone the counts are not known
            return tables
        read = partial(read_counts, source, source.obs([]), config.census.slice_nnz)
        baseline = logistic_regression(
            log_features(*read(known["soma_joinid"].to_numpy())),
            known["term"].to_pylist(),
            log_features(*read(aside.soma_joinid_N[seen.rows])),
            seen.types,
            config.train.seed,
        )
    return {**tables, "seen": replace(seen, baseline=baseline)}


def read_counts(source: Source, obs: pa.Table, slice_nnz: int, soma_joinid_N: np.ndarray) -> Counts:
    """Counts [N, genes] and totals [N] of cells by joinid, in the order given. obs: of the whole source."""
    wanted = obs.filter(pc.is_in(obs["soma_joinid"], pa.array(soma_joinid_N)))
    read = [source.reader(part) for part in make_slices(wanted, slice_nnz)]
    order_N = np.searchsorted(wanted["soma_joinid"].to_numpy(), soma_joinid_N)
    counts = sp.vstack([raw.counts for raw in read], format="csr")
    return counts[order_N], np.concatenate([raw.totals for raw in read])[order_N]


def joint_space(config: Config, model: LangCell, aside: Aside, tables: dict[str, Table]) -> JointSpace:
    """Cells set aside and all candidate texts, embedded by the model."""
    ontology = Ontology.load(config.text)
    candidates = sorted({term for table in tables.values() for term in table.candidates})
    terms = [term for term in map(ontology.get, candidates) if term is not None]

    def label(term_id: str) -> str:
        term = ontology.get(term_id)
        return term.label if term is not None else "unknown"

    cells = aside.cells
    return JointSpace(
        z_NP=embed_cells(model, cells.packed, config.eval.batch_tokens).numpy(),
        cell_type=[label(term) for term in cells.term],
        z_KP=embed_texts(
            model,
            load_tokenizer(config.model.text_init),
            [candidate(term) for term in terms],
            config.text.max_length,
        ).numpy(),
        text=[term.label for term in terms],
        held_out=frozenset(map(label, set(cells.term) - set(cells.train_types))),
    )


def zero_shot_summary(tables: dict[str, Table]) -> dict[str, Any]:
    """`zero_shot` of summary.json."""
    return {name: table.to_dict() for name, table in tables.items()}
