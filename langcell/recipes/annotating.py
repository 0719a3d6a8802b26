"""Annotation as a Ray Data graph: actors that hold the model, and read a chunk of cells at a time.

Of an .h5ad file that every node sees, an actor reads its rows itself, backed. Of a Census the readers of the
passes deliver slices, with their retries; cells that they judge bad, and droplets without a gene of the
model, are called unassigned. What comes back is 1.1 KB a cell, embedding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import anndata
import numpy as np
import pyarrow as pa
import ray
import torch

from langcell.batch import Packed
from langcell.cells.faults import Fault
from langcell.census.datasource import SliceSource
from langcell.census.reading import counts_block, counts_bytes
from langcell.census.slices import Reader, Slice
from langcell.corpus.progress import Progress
from langcell.corpus.tasks import RETRIES, graph
from langcell.corpus.token_pass import Encoder
from langcell.inference.annotate import Annotator, Calls, counts_of
from langcell.inference.candidates import Candidate
from langcell.inference.counts import Counts
from langcell.inference.options import AnnotateOptions
from langcell.inference.pretrained import Pretrained


class Study(Protocol):
    """Cells to be annotated. Travels by pickle into actors."""

    def dataset(self) -> ray.data.Dataset:
        """A block for each piece of work."""
        ...

    def pieces(self) -> int:
        """How many blocks there are."""
        ...

    def sentences(self, model: Pretrained, block: pa.Table) -> tuple[np.ndarray, Packed]:
        """Rows of the cells of a block (int64), and their sentences; `<cls>` alone for one without counts."""
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
            self._counts = counts_of(adata, model, self.layer, self.symbols)
        return self._counts

    def sentences(self, model: Pretrained, block: pa.Table) -> tuple[np.ndarray, Packed]:
        start = block["start"][0].as_py()
        stop = min(start + self.chunk, self.cells)
        return np.arange(start, stop), self.counts(model).sentences(start, stop)

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

    def dataset(self) -> ray.data.Dataset:
        source = SliceSource(partial(counts_block, self.reader, self.attempts), self.slices, counts_bytes)
        return ray.data.read_datasource(source, override_num_blocks=len(self.slices))

    def pieces(self) -> int:
        return len(self.slices)

    def encoder(self, model: Pretrained) -> Encoder:
        """Counts to sentences under the model's medians and tokens."""
        return Encoder.of(model.beta, model.vocabulary, self.feature_id, model.max_length)

    def sentences(self, model: Pretrained, block: pa.Table) -> tuple[np.ndarray, Packed]:
        offsets, tokens, fault = self.encoder(model)(block)
        silent = fault != Fault.NONE
        lengths = np.where(silent, 1, np.diff(offsets))
        filled = np.full(int(lengths.sum()), model.vocabulary.cls, np.int64)
        filled[np.repeat(~silent, lengths)] = tokens[np.repeat(~silent, np.diff(offsets))]
        rows = np.searchsorted(self.joinid, block["soma_joinid"].to_numpy())
        return rows, Packed.from_offsets(filled, np.concatenate([[0], np.cumsum(lengths)]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "slices": []}  # what reads them has them


class Actor:
    """A process with the model in memory."""

    def __init__(
        self, study: Study, model: str, candidates: list[Candidate], options: AnnotateOptions, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._study = study
        self._annotator = Annotator(Pretrained.from_pretrained(model), candidates, options)

    def __call__(self, block: pa.Table) -> pa.Table:
        rows, sentences = self._study.sentences(self._annotator.model, block)
        calls = self._annotator(sentences)
        width = calls.z_NP.shape[1]
        z = pa.FixedSizeListArray.from_arrays(pa.array(calls.z_NP.ravel()), width)
        scalars = {
            name: getattr(calls, name) for name in Calls.__annotations__ if name not in ("z_NP", "term")
        }
        return pa.table({"row": rows, **scalars, "term": pa.array(calls.term, pa.string()), "z": z})


def annotate_all(
    study: Study, model: str, candidates: list[Candidate], options: AnnotateOptions, actors: int | None
) -> Iterator[tuple[int, Calls]]:
    """Calls of all cells, by runs of rows: the first one, and theirs. The process must be connected to Ray.

    model: its directory, which every node sees; actors: most processes, None: one a GPU, else one a CPU.
    Raises InputError for storage that fails and counts that are none.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if torch.version.cuda is not None else 0
    cpus = int(resources.get("CPU", 1))
    most = actors or gpus or max(1, cpus)
    most = min(most, study.pieces())
    needs: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    with graph(), Progress("cells", study.pieces()) as progress:
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
            edges = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
            for first, last in pairwise(edges):
                yield int(rows[first]), _calls(table.slice(first, last - first))
            progress.add(len(rows))


def _calls(table: pa.Table) -> Calls:
    z = table["z"].combine_chunks()
    width = z.type.list_size
    values = {name: table[name].to_numpy() for name in Calls.__annotations__ if name not in ("z_NP", "term")}
    term = np.array(table["term"].to_pylist(), object)
    return Calls(**values, term=term, z_NP=z.flatten().to_numpy().reshape(-1, width))
