"""Annotation as a Ray Data graph: actors that hold the model, and read a chunk of cells at a time.

Of an .h5ad file that every node sees, an actor reads its rows itself, backed. Of a Census the readers of the
passes deliver slices, with their retries and their judgement of bad cells, which travels along: what becomes
of them is decided on the driver. A droplet without a gene of the model is unassigned. What comes back is
1.1 KB a cell, embedding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import anndata
import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError

from langcell.batch import Packed
from langcell.cells.faults import Fault
from langcell.census.datasource import SliceSource
from langcell.census.reading import counts_block, counts_bytes, counts_of
from langcell.census.slices import Reader, Slice
from langcell.corpus.progress import Progress
from langcell.corpus.tasks import RETRIES, graph
from langcell.corpus.token_pass import Encoder
from langcell.errors import InputError
from langcell.inference.annotate import Annotator, Calls
from langcell.inference.annotate import counts_of as counts_of_study
from langcell.inference.candidates import Candidate
from langcell.inference.counts import Counts
from langcell.inference.options import AnnotateOptions
from langcell.inference.pretrained import Pretrained


@dataclass(frozen=True)
class Sentences:
    """Some cells as a model reads them. rows: int64, which of all cells; packed: `<cls>` alone for one
    without counts or with a fault; fault: uint8 (`Fault`); slice, reason: of a Census, why it could not be
    read."""

    rows: np.ndarray
    packed: Packed
    fault: np.ndarray
    slice: int = 0
    reason: str = ""


class Study(Protocol):
    """Cells to be annotated. Travels by pickle into actors."""

    def dataset(self) -> ray.data.Dataset:
        """A block for each piece of work."""
        ...

    def pieces(self) -> int:
        """How many blocks there are."""
        ...

    def sentences(self, model: Pretrained, block: pa.Table) -> Sentences:
        """The sentences of the cells of a block."""
        ...


@dataclass
class FileStudy:
    """An .h5ad file. chunk: cells of a piece."""

    path: str
    layer: str | None
    symbols: dict[str, str] | None
    cells: int
    chunk: int
    _counts: Counts | None = field(default=None, repr=False)

    def dataset(self) -> ray.data.Dataset:
        starts = np.arange(0, self.cells, self.chunk)
        return ray.data.from_arrow([pa.table({"start": starts[i : i + 1]}) for i in range(len(starts))])

    def pieces(self) -> int:
        return -(-self.cells // self.chunk)

    def counts(self, model: Pretrained) -> Counts:
        """The file, opened. Raises InputError for counts or genes that cannot be used."""
        if self._counts is None:
            adata = anndata.read_h5ad(self.path, backed="r")
            self._counts = counts_of_study(adata, model, self.layer, self.symbols)
        return self._counts

    def sentences(self, model: Pretrained, block: pa.Table) -> Sentences:
        start = block["start"][0].as_py()
        stop = min(start + self.chunk, self.cells)
        packed = self.counts(model).sentences(start, stop)
        return Sentences(np.arange(start, stop), packed, np.zeros(stop - start, np.uint8))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counts": None}  # an open file stays where it is


@dataclass
class CensusStudy:
    """Cells of a Census, or of a folder of .h5ad files. joinid: int64 [cells], ascending; feature_id: genes
    of the slices' columns."""

    reader: Reader
    slices: list[Slice]
    joinid: np.ndarray
    feature_id: list[str]
    attempts: int
    _encoder: tuple[np.ndarray, Encoder] | None = field(default=None, repr=False)

    def dataset(self) -> ray.data.Dataset:
        source = SliceSource(partial(counts_block, self.reader, self.attempts), self.slices, counts_bytes)
        return ray.data.read_datasource(source, override_num_blocks=len(self.slices))

    def pieces(self) -> int:
        return len(self.slices)

    def encoder(self, model: Pretrained) -> tuple[np.ndarray, Encoder]:
        """Columns of the slices that are genes of the model, in the order of its medians (which breaks ties,
        and need not be this source's), and what encodes them; found once a process,
        which has one model. Raises InputError where there is none."""
        if self._encoder is not None:
            return self._encoder
        row_of = {gene: row for row, gene in enumerate(model.beta.feature_id)}
        rows = np.array([row_of.get(gene, -1) for gene in self.feature_id])
        columns = np.flatnonzero(rows >= 0)
        columns = columns[np.argsort(rows[columns], kind="stable")]
        if not len(columns):
            raise InputError(
                f"none of the {len(self.feature_id)} genes ({', '.join(self.feature_id[:3])}, ...) is one of "
                f"{model.name} ({', '.join(model.beta.feature_id[:3])}, ...)"
            )
        genes = [self.feature_id[column] for column in columns]
        self._encoder = columns, Encoder.of(model.beta, model.vocabulary, genes, model.max_length)
        return self._encoder

    def sentences(self, model: Pretrained, block: pa.Table) -> Sentences:
        columns, encoder = self.encoder(model)
        counts = counts_of(block, len(self.feature_id))[:, columns]
        fault, totals = block["fault"].to_numpy(), block["raw_sum"].to_numpy()
        offsets, tokens, fault = encoder.encode(counts, totals, fault)
        silent = fault != Fault.NONE
        lengths = np.where(silent, 1, np.diff(offsets))
        filled = np.full(int(lengths.sum()), model.vocabulary.cls, np.int64)
        filled[np.repeat(~silent, lengths)] = tokens[np.repeat(~silent, np.diff(offsets))]
        rows = np.searchsorted(self.joinid, block["soma_joinid"].to_numpy())
        packed = Packed.from_offsets(filled, np.concatenate([[0], np.cumsum(lengths)]))
        return Sentences(rows, packed, fault, block["slice"][0].as_py(), block["reason"][0].as_py())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "slices": [], "_encoder": None}  # what reads slices has them


class Actor:
    """A process with the model in memory."""

    def __init__(
        self, study: Study, model: str, candidates: list[Candidate], options: AnnotateOptions, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._study = study
        self._annotator = Annotator(Pretrained.from_pretrained(model), candidates, options)

    def __call__(self, block: pa.Table) -> pa.Table:
        cells = self._study.sentences(self._annotator.model, block)
        calls = self._annotator(cells.packed)
        width = calls.z_NP.shape[1]
        z = pa.FixedSizeListArray.from_arrays(pa.array(calls.z_NP.ravel()), width)
        scalars = {
            name: getattr(calls, name) for name in Calls.__annotations__ if name not in ("z_NP", "term")
        }
        n = len(cells.rows)
        about = {
            "row": cells.rows,
            "fault": cells.fault,
            "slice": np.full(n, cells.slice, np.int32),
            "reason": pa.DictionaryArray.from_arrays(np.zeros(n, np.int8), [cells.reason]),
        }
        return pa.table({**about, **scalars, "term": pa.array(calls.term, pa.string()), "z": z})


def annotate_all(
    study: Study,
    model: str,
    candidates: list[Candidate],
    options: AnnotateOptions,
    actors: int | None,
    note: Callable[[int, np.ndarray, np.ndarray, str], None],
) -> Iterator[tuple[int, Calls]]:
    """Calls of all cells, by runs of rows: the first one, and theirs. The process must be connected to Ray.

    model: its directory, which every node sees; actors: most processes, None: one a GPU, else one a CPU.
    note: takes slice, rows and faults of each block, and why it could not be read, and may raise InputError
    for them. Raises InputError for storage that fails, and where processes die again and again.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if torch.version.cuda is not None else 0
    cpus = int(resources.get("CPU", 1))
    most = actors or gpus or max(1, cpus)
    most = min(most, study.pieces())
    needs: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    with _plainly(), graph(), Progress("cells", study.pieces()) as progress:
        found = study.dataset().map_batches(
            Actor,
            fn_constructor_args=(study, model, candidates, options, 1 if not gpus else 4),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            **needs,
        )
        for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            rows = table["row"].to_numpy()
            note(table["slice"][0].as_py(), rows, table["fault"].to_numpy(), table["reason"][0].as_py())
            edges = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
            for first, last in pairwise(edges):
                yield int(rows[first]), _calls(table.slice(first, last - first))
            progress.add(len(rows))


@contextmanager
def _plainly() -> Iterator[None]:
    """Raises InputError for actors that die."""
    try:
        yield
    except RayActorError as error:
        raise InputError(
            f"a process that annotates died {RETRIES + 1} times. Most likely its node lacks memory: lower "
            "--annotate.chunk (of a Census --census.slice_nnz) or --score.batch_tokens, or --annotate.actors"
        ) from error


def _calls(table: pa.Table) -> Calls:
    z = table["z"].combine_chunks()
    width = z.type.list_size
    values = {name: table[name].to_numpy() for name in Calls.__annotations__ if name not in ("z_NP", "term")}
    term = np.array(table["term"].to_pylist(), object)
    return Calls(**values, term=term, z_NP=z.flatten().to_numpy().reshape(-1, width))
