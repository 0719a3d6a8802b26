"""Cells of a Census, slice by slice: a release on S3, a local copy or the embedded one.

The obs table is read once; from it the cells are cut into slices, contiguous ranges of joinids that
hold at most `census.slice_nnz` non-zeros, so that the memory of a read task is bounded and known
before it runs. What a slice yields is a pure function of (release, filter, slice).

How a slice is read, and why (measured on one core over a Census-shaped X of 85.6M non-zeros):
- A row touches 31 of the 53 data tiles of its band of 2,048 rows, so a 10% random read decodes as
  much as a full one (1.5k useful cells/s against 31k). Whole bands are read and unwanted rows
  dropped here, batch by batch; bands without a wanted cell are skipped. For the same reason slices
  are cut at the edges of bands, and inside one only where it alone exceeds the bound.
- Buffers of 4 MiB and a budget of 256 MiB instead of the 1 GiB default: 31k instead of 14k cells/s
  at a lower peak, about the rate of decompression alone. One thread per process for local files
  (Ray runs a process per core); on S3 TileDB keeps its threads for I/O, which only wait.
- Handles are opened inside the task (TileDB's threads do not survive a fork) and the collection is
  held while its X is read (a child of a collected parent is closed).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

import cellxgene_census
import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from langcell.census.demo import build_demo
from langcell.census.options import CensusOptions
from langcell.errors import InputError

BAND = 2048
"""Rows of a data tile of X/raw (Census schema 2.4.0)."""

_TEXT = pa.dictionary(pa.int32(), pa.string())


class Census:
    """The cells that the options select, ready to be cut into slices.

    options: the same with its place resolved (absolute paths, the release's URI), as tasks on other
    nodes need it. release: what the cells come from, for a manifest: `uri` or `version`,
    `organism`, `filter`, `schema` and `build` (both from the Census's own summary).
    """

    def __init__(
        self,
        options: CensusOptions,
        release: dict[str, str],
        collection: soma.Collection,
        experiment: soma.Experiment,
    ) -> None:
        self.options = options
        self.release = release
        self._collection = collection  # keeps the experiment's handle open
        self._experiment = experiment

    @classmethod
    def open(cls, options: CensusOptions) -> Census:
        """Opens the Census and checks that the filter is understood and matches a cell.

        Raises InputError: nothing to open at the URI or under the version, no Census layout,
        unknown organism, a filter that obs refuses or that matches no cell.
        """
        resolved = _resolve(options)
        collection = _open(resolved)
        experiment = _experiment(collection, resolved)
        summary = collection["census_info"]["summary"].read().concat()
        about = dict(zip(summary["label"].to_pylist(), summary["value"].to_pylist(), strict=True))
        build = about.get("census_build_date", "")
        if options.uri is None:
            # "stable" moves on: the build date does not, nor does the URI that tasks open.
            release = {"version": build}
            resolved = replace(resolved, uri=collection.uri)
        else:
            release = {"uri": str(resolved.uri)}
        release |= {
            "organism": options.organism,
            "filter": options.filter,
            "schema": about.get("census_schema_version", ""),
            "build": build,
        }
        census = cls(resolved, release, collection, experiment)
        if not any(len(batch) for batch in census._read_obs(["soma_joinid"])):
            raise InputError(
                f"census.filter {options.filter!r} matches no cell of {resolved.uri}, {options.organism}. "
                "Loosen it; labels and ontology ids are compared letter by letter."
            )
        return census

    def obs(self, columns: Iterable[str]) -> pa.Table:
        """The selected cells in joinid order.

        soma_joinid (int64), raw_sum (float64, total count over all genes measured), nnz (int64),
        then `columns`; text as dictionary<int32, string>. Raises InputError for a column that obs
        does not have.
        """
        names = list(dict.fromkeys(["soma_joinid", "raw_sum", "nnz", *columns]))
        present = self._experiment.obs.schema.names
        if missing := [name for name in names if name not in present]:
            raise InputError(
                f"obs of {self.options.uri}, {self.options.organism} has no column {', '.join(missing)}. "
                f"It has: {', '.join(present)}"
            )
        table = _in_order(pa.concat_tables(self._read_obs(names)).select(names))
        return pa.table({name: _encoded(table[name]) for name in names})

    def var(self) -> pa.Table:
        """The genes in joinid order: soma_joinid (int64), feature_id and feature_name (string).

        Row i is the gene of column i of every slice. Raises InputError if the joinids are not
        0, 1, 2, ..., as a Census numbers them.
        """
        fields = {"soma_joinid": pa.int64(), "feature_id": pa.string(), "feature_name": pa.string()}
        names = list(fields)
        table = _in_order(self._experiment.ms["RNA"].var.read(column_names=names).concat().select(names))
        if not np.array_equal(table["soma_joinid"], np.arange(len(table))):
            raise InputError(
                f"var of {self.options.uri} does not number its genes 0, 1, 2, ...: not a Census"
            )
        return table.cast(pa.schema(fields)).combine_chunks()

    def close(self) -> None:
        """Closes the handles."""
        self._collection.close()

    def __enter__(self) -> Census:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_obs(self, names: list[str]) -> Iterator[pa.Table]:
        wanted = self.options.filter.strip() or None
        try:
            yield from self._experiment.obs.read(value_filter=wanted, column_names=names)
        except soma.SOMAError as error:
            raise InputError(
                f"census.filter {wanted!r} cannot be applied to obs of {self.options.uri}: {_reason(error)}. "
                'It is a SOMA value filter, such as: is_primary_data == True and tissue_general in ["blood"]'
            ) from error


@dataclass(frozen=True)
class Slice:
    """One read task: the band of joinids [start, stop) and the cells wanted in it.

    cells: soma_joinid (int64, ascending), raw_sum (float64), nnz (int64) and whatever columns came
    with them; nnz: their non-zeros.
    """

    index: int
    start: int
    stop: int
    cells: pa.Table
    nnz: int


def make_slices(cells: pa.Table, max_nnz: int) -> list[Slice]:
    """Cuts cells (soma_joinid ascending, raw_sum, nnz, ...) into slices of near-equal non-zeros.

    As few slices as `max_nnz` allows, then the smallest largest one; a slice exceeds `max_nnz` only
    if it is a single cell. Cuts fall on the edges of bands, and between any two cells of a band
    that alone exceeds `max_nnz`. Depends on nothing but its arguments.
    """
    if not 0 < max_nnz < 2**31:
        raise InputError(f"census.slice_nnz is {max_nnz}; it must lie between 1 and 2,147,483,647")
    joinid = cells["soma_joinid"].to_numpy()
    if (np.diff(joinid) <= 0).any():
        raise ValueError("cells must be in ascending order of soma_joinid, each once")
    if not len(joinid):
        return []
    total = np.concatenate([[0], np.cumsum(cells["nnz"].to_numpy())])

    # Where a cut may fall: cell counts, ascending, first 0 and last all.
    edges = np.concatenate([[0], np.flatnonzero(np.diff(joinid // BAND)) + 1, [len(joinid)]])
    heavy = np.flatnonzero(np.diff(total[edges]) > max_nnz)
    inner = [np.arange(edges[i] + 1, edges[i + 1]) for i in heavy]
    edges = np.unique(np.concatenate([edges, *inner]))
    at_edge = total[edges]

    def cut(bound: int) -> list[int]:
        """Edges at which slices of at most `bound` non-zeros, filled from the left, begin and end."""
        marks = [0]
        while marks[-1] < len(edges) - 1:
            fits = int(np.searchsorted(at_edge, at_edge[marks[-1]] + bound, side="right")) - 1
            marks.append(max(fits, marks[-1] + 1))
        return marks

    fewest = len(cut(max_nnz))
    low, high = 0, max_nnz  # the least bound that still needs no more slices
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= fewest else (middle + 1, high)
    marks = edges[cut(low)]
    return [
        Slice(
            index,
            int(joinid[first]),
            int(joinid[last - 1]) + 1,
            cells.take(np.arange(first, last)),  # a copy: a view would ship the whole table to a task
            int(total[last] - total[first]),
        )
        for index, (first, last) in enumerate(pairwise(marks))
    ]


def read_slice(options: CensusOptions, n_vars: int, part: Slice) -> sp.csr_matrix:
    """Raw counts of a slice: float32 CSR [len(part.cells), n_vars], rows as in `part.cells`,
    columns in ascending order within a row.

    Opens its own handles; `options` as `Census.options`. Peak memory is about 40 bytes per non-zero
    of the wanted cells. Raises RuntimeError if the store gives another number of non-zeros than
    obs promises: a part of a read must never pass for the whole.
    """
    joinid = part.cells["soma_joinid"].to_numpy()
    row_of = np.full(part.stop - part.start, -1, np.int32)
    row_of[joinid - part.start] = np.arange(len(joinid), dtype=np.int32)
    row, column = np.empty(part.nnz, np.int32), np.empty(part.nnz, np.int32)
    count = np.empty(part.nnz, np.float32)
    read = 0
    with _reading(options) as x_raw:
        for start, stop in _runs(joinid, part):
            for batch in x_raw.read((_closed(start, stop), _closed(0, n_vars))).tables():
                rows = row_of[batch["soma_dim_0"].to_numpy() - part.start]
                wanted = rows >= 0
                here = int(np.count_nonzero(wanted))
                if read + here <= part.nnz:
                    row[read : read + here] = rows[wanted]
                    column[read : read + here] = batch["soma_dim_1"].to_numpy()[wanted]
                    count[read : read + here] = batch["soma_data"].to_numpy()[wanted]
                read += here
    if read != part.nnz:
        raise RuntimeError(
            f"slice {part.index}, joinids {part.start}-{part.stop - 1} of {options.uri}: read {read} "
            f"non-zeros, obs promises {part.nnz}"
        )
    matrix = sp.coo_matrix((count, (row, column)), shape=(len(joinid), n_vars)).tocsr()
    matrix.sort_indices()
    return matrix


def _runs(joinid: np.ndarray, part: Slice) -> list[tuple[int, int]]:
    """Ranges [start, stop) of adjacent bands that hold a wanted cell, clipped to the slice."""
    bands = np.unique(joinid // BAND)
    parts = np.split(bands, np.flatnonzero(np.diff(bands) > 1) + 1)
    return [(max(part.start, int(p[0]) * BAND), min(part.stop, int(p[-1] + 1) * BAND)) for p in parts]


class SomaSlices(Datasource):
    """Ray Data source with one read task, and one block, per slice.

    A block is an Arrow table, one row per cell: the columns of `Slice.cells`, `slice` (int32),
    `gene` (list<int32>, columns of var) and `count` (list<float32>). `options` as `Census.options`.
    """

    def __init__(self, options: CensusOptions, n_vars: int, slices: list[Slice]) -> None:
        super().__init__()
        self._options, self._n_vars, self._slices = options, n_vars, slices

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        return sum(_block_bytes(part) for part in self._slices)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task per slice, whatever `parallelism`: a slice is the unit that is recomputed."""
        return [
            ReadTask(
                partial(_blocks, self._options, self._n_vars, part),
                BlockMetadata(
                    num_rows=len(part.cells),
                    size_bytes=_block_bytes(part),
                    exec_stats=None,
                    input_files=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for part in self._slices
        ]


def block_to_csr(table: pa.Table, n_vars: int) -> sp.csr_matrix:
    """Counts of a block of `SomaSlices`, or of any rows of one: float32 CSR [rows, n_vars]."""
    gene, count = (table[name].combine_chunks() for name in ("gene", "count"))
    offsets = gene.offsets.to_numpy()
    return sp.csr_matrix(
        (count.flatten().to_numpy(), gene.flatten().to_numpy(), offsets - offsets[0]), (len(table), n_vars)
    )


def _blocks(options: CensusOptions, n_vars: int, part: Slice) -> Iterator[pa.Table]:
    matrix = read_slice(options, n_vars, part)
    offsets = pa.array(matrix.indptr.astype(np.int32, copy=False))
    table = part.cells.append_column("slice", pa.array(np.full(len(part.cells), part.index, np.int32)))
    table = table.append_column("gene", pa.ListArray.from_arrays(offsets, pa.array(matrix.indices)))
    yield table.append_column("count", pa.ListArray.from_arrays(offsets, pa.array(matrix.data)))


def _block_bytes(part: Slice) -> int:
    # cells, then slice and two offsets a row, then gene and count a non-zero
    return part.cells.nbytes + 12 * len(part.cells) + 8 * part.nnz


def _resolve(options: CensusOptions) -> CensusOptions:
    uri = options.uri
    if uri is not None and uri != "demo" and "://" not in uri:
        uri = os.path.abspath(uri)
    return replace(options, uri=uri, dir=os.path.abspath(options.dir))


def _open(options: CensusOptions) -> soma.Collection:
    uri = options.uri
    if uri == "demo":  # on every node that reads it, so that no shared disk is needed
        uri = build_demo(os.path.join(options.dir, "pbmc68k_reduced"))
    config: dict[str, int] = {"soma.init_buffer_bytes": 4 << 20, "sm.mem.total_budget": 256 << 20}
    config["sm.compute_concurrency_level"] = 1
    if uri is not None and ("://" not in uri or uri.startswith("file:")):
        config["sm.io_concurrency_level"] = 1
    try:
        if uri is None:
            return cellxgene_census.open_soma(census_version=options.version, tiledb_config=config)
        return cellxgene_census.open_soma(uri=uri, tiledb_config=config)
    except (soma.SOMAError, ValueError, OSError) as error:
        if uri is None:
            advice = (
                f"census.version {options.version!r} cannot be opened: {_reason(error)}. Give the date of a "
                "release, `stable` or `latest`, and a network that reaches it, or a copy with census.uri"
            )
        else:
            advice = (
                f"census.uri {uri}: no SOMA collection can be opened there: {_reason(error)}. Give the "
                "folder or URI of a Census, or `demo` for the embedded one"
            )
        raise InputError(advice) from error


def _experiment(collection: soma.Collection, options: CensusOptions) -> soma.Experiment:
    try:
        collection["census_info"]["summary"]
        organisms = collection["census_data"]
        if options.organism not in organisms:
            raise InputError(
                f"census.organism {options.organism!r} is not in {collection.uri}. "
                f"It holds: {', '.join(sorted(organisms))}"
            )
        experiment = organisms[options.organism]
        experiment.obs, experiment.ms["RNA"].var, experiment.ms["RNA"].X["raw"]
    except (KeyError, AttributeError) as error:
        raise InputError(
            f"{collection.uri} is not a Census: it has no {_reason(error)}. The layout is "
            "census_info/summary and census_data/<organism>/{obs, ms/RNA/{var, X/raw}}"
        ) from error
    return experiment


@contextmanager
def _reading(options: CensusOptions) -> Iterator[soma.SparseNDArray]:
    with _open(options) as collection:
        experiment = _experiment(collection, options)  # bound: its X closes with it
        yield cast(soma.SparseNDArray, experiment.ms["RNA"].X["raw"])


def _closed(start: int, stop: int) -> slice:
    """SOMA ranges include their end."""
    return slice(start, stop - 1)


def _in_order(table: pa.Table) -> pa.Table:
    """The rows by ascending soma_joinid; a read returns them in the order of the storage."""
    joinid = table["soma_joinid"].to_numpy()
    return table if (np.diff(joinid) > 0).all() else table.take(np.argsort(joinid, kind="stable"))


def _encoded(column: pa.ChunkedArray) -> pa.Array:
    """One chunk, text as dictionary<int32, string> (releases before 2024 store it plain)."""
    if pa.types.is_large_string(column.type):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries().cast(_TEXT)
    return column.combine_chunks()


def _reason(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    return str(error).strip().splitlines()[0].strip("'\"") or type(error).__name__
