"""The five zero-shot tables of a model, from the cells that a corpus kept aside.

The model judges sentences of the corpus; only the supervised baseline goes back to the source for counts, on
storage that may have failed since, with a training behind it that took days. So it reads as the passes over
X do, in tasks that are tried again, and is left out where that does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import scipy.sparse as sp

from langcell.batch import Packed
from langcell.cells.faults import Fault
from langcell.census.experiment import Census
from langcell.census.options import CensusOptions
from langcell.census.reading import read_cells
from langcell.census.slices import Source, make_slices
from langcell.census.source import open_source
from langcell.census.tokenised import TokenisedFolder
from langcell.config import Config
from langcell.corpus.blocks import sample_cells
from langcell.corpus.manifest import Manifest
from langcell.corpus.measuring import measure
from langcell.corpus.schema import SPLITS, TRAIN
from langcell.corpus.tasks import plainly, task
from langcell.corpus.texts import read_texts
from langcell.errors import InputError
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

TASK_NNZ = 250_000
"""Most non-zeros of a task that reads counts of a sample: some 150 cells, which stand in as many bands of a
large Census, 66 ms each."""


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
    """The five tables with both scores, `seen` beside logistic regression on the same cells' counts.

    The process must be connected to Ray.
    """
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
    baseline = supervised(
        config.census, known, aside.soma_joinid_N[seen.rows], seen.types, seed=config.train.seed
    )
    return {**tables, "seen": replace(seen, baseline=baseline)}


def supervised(
    census: CensusOptions, train: pa.Table, soma_joinid_N: np.ndarray, types: Sequence[str], *, seed: int
) -> dict[str, float] | None:
    """Measures of logistic regression on the counts of the cells `soma_joinid_N`, whose types are `types`.

    train: cells to learn from, soma_joinid and term. Cells whose counts are none are left out of both. None
    where there are no counts (a source of sentences), and, with a printed line, where they cannot be read
    any more: a comparison shall not cost a finished training.
    """
    joinid = np.concatenate([train["soma_joinid"].to_numpy(), soma_joinid_N])
    try:
        with closing(open_source(census)) as source:
            if isinstance(source, TokenisedFolder):
                return None
            counts, totals, sound = read_counts(source, census, joinid)
    except InputError as error:
        print(f"no logistic regression beside `seen`: {error}", flush=True)
        return None
    features = log_features(counts, totals)
    learnt, asked = sound[: len(train)], sound[len(train) :]
    n = int(learnt.sum())
    return logistic_regression(
        features[:n],
        np.asarray(train["term"].to_pylist())[learnt].tolist(),
        features[n:],
        np.asarray(types)[asked].tolist(),
        seed,
    )


def read_counts(
    source: Source, census: CensusOptions, soma_joinid_N: np.ndarray
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Counts [M, genes] and totals [M] of those of the cells that are sound, in the order given, and which
    these are (bool [N]). The process must be connected to Ray.

    Raises InputError where a slice cannot be read, or a task's worker died again and again.
    """
    obs = source.obs([])
    wanted = obs.filter(pc.is_in(obs["soma_joinid"], pa.array(soma_joinid_N)))
    if isinstance(source, Census) and wanted["nnz"].null_count:
        wanted = measure(source.reader, census.attempts, wanted)
    reader, reading = ray.put(source.reader), task(read_cells)
    slices = make_slices(wanted, min(census.slice_nnz, TASK_NNZ))
    with plainly():
        read = ray.get([reading.remote(reader, part, census.attempts) for part in slices])
    if reasons := [cells.reason for cells in read if cells.reason]:
        raise InputError(f"census: {len(reasons)} of {len(read)} slices cannot be read: {reasons[0]}")
    row_N = np.searchsorted(wanted["soma_joinid"].to_numpy(), soma_joinid_N)
    sound_N = (np.concatenate([cells.fault for cells in read]) == Fault.NONE)[row_N]
    rows = row_N[sound_N]
    counts = sp.vstack([cells.counts for cells in read], format="csr")
    return counts[rows], np.concatenate([cells.totals for cells in read])[rows], sound_N


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
