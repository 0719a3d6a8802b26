"""Cells of a Census, slice by slice: a release on S3, a local copy or the embedded one.

The obs table is read once; from it the cells are cut into slices, contiguous ranges of joinids that
hold at most `census.slice_nnz` non-zeros, so that the memory of a read task is bounded and known
before it runs. What a slice yields is a pure function of (release, filter, slice).

How a slice is read, and why (measured on one core over a Census-shaped X of 85.6M non-zeros):
- A row touches 31 of the 53 data tiles of its band of 2,048 rows, so a 10% random read decodes as
  much as a full one (1.5k useful cells/s against 31k). Whole bands are read and unwanted rows
  dropped here, batch by batch; bands without a wanted cell are skipped. For the same reason slices
  are cut at the edges of bands, and inside one only where it alone exceeds the bound.
- obs says how many non-zeros a cell has, so each goes to its place in the CSR as it arrives: no sort,
  8 bytes each beside TileDB's buffers, and a read that is short of one entry is noticed.
- Handles are opened inside the task, tuned as `langcell.census.opening` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numba as nb
import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from langcell.census.opening import experiment_of, open_collection, reading_x, reason_of, resolve
from langcell.census.options import CensusOptions
from langcell.errors import InputError

BAND = 2048
"""Rows of a data tile of X/raw (Census schema 2.4.0)."""

_COO = ("soma_dim_0", "soma_dim_1", "soma_data")
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
        resolved = resolve(options)
        collection = open_collection(resolved)
        experiment = experiment_of(collection, resolved)
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
        try:
            matches = any(len(batch) for batch in census._read_obs(["soma_joinid"]))
        except soma.SOMAError as error:
            raise InputError(
                f"census.filter {options.filter!r} cannot be applied to obs of {resolved.uri}: "
                f"{reason_of(error)}. It is a SOMA value filter, such as: is_primary_data == True and "
                'tissue_general in ["blood"]'
            ) from error
        if not matches:
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
        return iter(self._experiment.obs.read(value_filter=wanted, column_names=names))


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
    """Raw counts of a slice: float32 CSR [len(part.cells), n_vars], rows as in `part.cells`, columns in
    ascending order within a row.

    Opens its own handles; `options` as `Census.options`. Raises RuntimeError if the store gives a cell
    another number of non-zeros than obs promises: a part of a read must never pass for the whole.
    """
    joinid = part.cells["soma_joinid"].to_numpy()
    # The lengths of the rows are known, so every entry goes straight to its place.
    offsets = np.concatenate([[0], np.cumsum(part.cells["nnz"].to_numpy())]).astype(np.int32)
    gene, count = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    cursor, more = offsets[:-1].copy(), np.zeros(len(joinid), np.int32)
    with reading_x(options) as x_raw:
        for start, stop in _runs(joinid, part):
            first, last = np.searchsorted(joinid, [start, stop])
            row_of = np.full(stop - start, -1, np.int32)
            row_of[joinid[first:last] - start] = np.arange(first, last, dtype=np.int32)
            for batch in x_raw.read((_closed(start, stop), _closed(0, n_vars))).tables():
                cell, column, value = (batch[name].to_numpy() for name in _COO)
                _place(cell, column, value, start, row_of, offsets, cursor, more, gene, count)
    found = cursor - offsets[:-1] + more
    if (wrong := np.flatnonzero(found != np.diff(offsets))).size:
        row = wrong[0]
        raise RuntimeError(
            f"{options.uri}, slice {part.index}: cell {joinid[row]} has {found[row]} non-zeros in X/raw, "
            f"obs promises {offsets[row + 1] - offsets[row]} ({wrong.size} such cells)"
        )
    matrix = sp.csr_matrix((count, gene, offsets), (len(joinid), n_vars))
    matrix.sort_indices()  # a check only, where X is tiled as in a release
    return matrix


@nb.njit(cache=True, nogil=True)
def _place(dim_0, dim_1, data, start, row_of, offsets, cursor, more, gene, count):  # type: ignore[no-untyped-def]
    """Puts the entries of wanted rows at the rows' cursors; counts in `more` what has no room."""
    for i in range(len(dim_0)):
        row = row_of[dim_0[i] - start]
        if row < 0:
            continue
        at = cursor[row]
        if at == offsets[row + 1]:
            more[row] += 1
            continue
        gene[at], count[at] = dim_1[i], data[i]
        cursor[row] = at + 1


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
