"""Cells of a SOMA Experiment in the Census layout: a release on S3, a local copy or the embedded one.

How a slice is read, and why (measured on one core over a Census-shaped X of 85.6M non-zeros):
- A row touches 31 of the 53 data tiles of its band of 2,048 rows, so a 10% random read decodes as
  much as a full one (1.5k useful cells/s against 31k). Whole bands are read and unwanted rows
  dropped here, batch by batch; bands without a wanted cell are skipped.
- obs says how many non-zeros a cell has, so each goes to its place in the CSR as it arrives: no sort,
  8 bytes each beside TileDB's buffers, and a cell that X and obs tell differently is noticed.
- Handles are opened inside the task, tuned as `langcell.census.opening` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
import tiledbsoma as soma

from langcell.census.opening import (
    experiment_of,
    open_collection,
    reading_x,
    reason_of,
    resolve,
    told_plainly,
)
from langcell.census.options import CensusOptions
from langcell.census.slices import BAND, RawCells, Slice
from langcell.errors import InputError

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
        release: dict[str, Any],
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
        with told_plainly(collection.uri):
            experiment = experiment_of(collection, resolved)
            summary = collection["census_info"]["summary"].read().concat()
        about = dict(zip(summary["label"].to_pylist(), summary["value"].to_pylist(), strict=True))
        build = about.get("census_build_date", "")
        if options.uri is None:
            # "stable" moves on: the build date does not, nor does the URI that tasks open, unsigned too.
            release = {"version": build}
            unsigned: dict[str, str | int] = {"vfs.s3.no_sign_request": "true"}
            resolved = replace(resolved, uri=collection.uri, tiledb=unsigned | resolved.tiledb)
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

        soma_joinid (int64), raw_sum (float64, total count over all genes measured), nnz (int64), both
        null where obs has not got them, then `columns`; text as dictionary<int32, string>. Raises
        InputError for a column that obs does not have, and for cells beyond X.
        """
        names = list(dict.fromkeys(["soma_joinid", "raw_sum", "nnz", *columns]))
        present = self._experiment.obs.schema.names
        if not {"raw_sum", "nnz"} <= set(present):  # releases before 2023-12-15
            names = [name for name in names if name not in ("raw_sum", "nnz")]
        if missing := [name for name in names if name not in present]:
            raise InputError(
                f"obs of {self.options.uri}, {self.options.organism} has no column {', '.join(missing)}. "
                f"It has: {', '.join(present)}"
            )
        with told_plainly(str(self.options.uri)):
            # Encoded batch by batch: as plain strings, 18 columns of a release of 2023 are 450 bytes a cell.
            batches = (pa.table({name: _encoded(b[name]) for name in names}) for b in self._read_obs(names))
            table = _in_order(pa.concat_tables(batches).unify_dictionaries())
            rows = self._experiment.ms["RNA"].X["raw"].shape[0]
        if (last := table["soma_joinid"][-1].as_py()) >= rows:
            raise InputError(
                f"obs of {self.options.uri} does not fit X: it has the cell {last}, X/raw ends at "
                f"{rows - 1}. They are of two releases, or a copy was cut short: copy the Census again."
            )
        obs = pa.table({name: _encoded(table[name]) for name in names})
        if "nnz" in names:
            return obs.set_column(names.index("nnz"), "nnz", self._promised(obs["nnz"]))
        obs = obs.add_column(1, "raw_sum", pa.nulls(len(obs), pa.float64()))
        return obs.add_column(2, "nnz", pa.nulls(len(obs), pa.int64()))

    def var(self) -> pa.Table:
        """The genes in joinid order: soma_joinid (int64), feature_id and feature_name (string).

        Row i is the gene of column i of every slice. Raises InputError if the joinids are not
        0, 1, 2, ..., as a Census numbers them.
        """
        fields = {"soma_joinid": pa.int64(), "feature_id": pa.string(), "feature_name": pa.string()}
        names = list(fields)
        with told_plainly(str(self.options.uri)):
            rna = self._experiment.ms["RNA"]
            table = _in_order(rna.var.read(column_names=names).concat().select(names))
            columns = rna.X["raw"].shape[1]
        if not np.array_equal(table["soma_joinid"], np.arange(len(table))):
            raise InputError(
                f"var of {self.options.uri} does not number its genes 0, 1, 2, ...: not a Census"
            )
        if len(table) > columns:
            raise InputError(
                f"var of {self.options.uri} does not fit X: {len(table)} genes, X/raw has {columns} columns. "
                "They are of two releases, or a copy was cut short: copy the Census again."
            )
        return table.cast(pa.schema(fields)).combine_chunks()

    def _promised(self, nnz: pa.ChunkedArray) -> pa.Array:
        """Non-zeros of the cells as obs says; 0, which X will not fit, where that is no number of genes."""
        n_vars = self._experiment.ms["RNA"].var.count
        possible = pc.and_(pc.greater_equal(nnz, 0), pc.less_equal(nnz, n_vars)).fill_null(False)
        return pc.if_else(possible, nnz, 0).combine_chunks()

    @property
    def reader(self) -> ExperimentReader:
        rna = self._experiment.ms["RNA"]
        return ExperimentReader(self.options, rna.X["raw"].uri, rna.var.count)

    @property
    def remarks(self) -> dict[str, dict[str, Any]]:
        """None: a Census is one collection in its own words."""
        return {}

    def datasets(self, soma_joinid: np.ndarray) -> list[str]:
        """dataset_id of each cell (joinids ascending), `unknown` where obs does not say."""
        names = ["soma_joinid", "dataset_id"]
        if "dataset_id" not in self._experiment.obs.schema.names:
            return ["unknown"] * len(soma_joinid)
        with told_plainly(str(self.options.uri)):
            read = self._experiment.obs.read((pa.array(soma_joinid),), column_names=names)
            return _in_order(read.concat().select(names))["dataset_id"].cast(pa.string()).to_pylist()

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
class ExperimentReader:
    """Reads slices of X/raw. options: as `Census.options`; x_uri: where X/raw is; n_vars: genes of var."""

    options: CensusOptions
    x_uri: str
    n_vars: int

    def __call__(self, part: Slice) -> RawCells:
        """The raw counts of a slice; totals are obs's. A cell does not fit if X holds another number of
        non-zeros than obs says. Raises SOMAError where X cannot be read."""
        joinid = part.cells["soma_joinid"].to_numpy()
        # The lengths of the rows are known, so every entry goes straight to its place.
        offsets = np.concatenate([[0], np.cumsum(part.cells["nnz"].to_numpy())]).astype(np.int32)
        gene, count = np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1], np.float32)
        cursor, more = offsets[:-1].copy(), np.zeros(len(joinid), np.int32)
        with reading_x(self.options, self.x_uri) as x_raw:
            for start, stop in _runs(joinid, part.start, part.stop):
                first, last = np.searchsorted(joinid, [start, stop])
                row_of = np.full(stop - start, -1, np.int32)
                row_of[joinid[first:last] - start] = np.arange(first, last, dtype=np.int32)
                for batch in x_raw.read((_closed(start, stop), _closed(0, self.n_vars))).tables():
                    cell, column, value = (batch[name].to_numpy() for name in _COO)
                    _place(cell, column, value, start, row_of, offsets, cursor, more, gene, count)
        counts = sp.csr_matrix((count, gene, offsets), (len(joinid), self.n_vars))
        counts.sort_indices()  # a check only, where X is tiled as in a release
        fits = (cursor == offsets[1:]) & (more == 0)
        return RawCells(counts, part.cells["raw_sum"].to_numpy(), fits)

    def measure(self, joinid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Non-zeros (int64) and sum (float64) of the rows `joinid` (int64, ascending) of X. Raises SOMAError
        where it cannot be read."""
        nnz, raw_sum = np.zeros(len(joinid), np.int64), np.zeros(len(joinid))
        with reading_x(self.options, self.x_uri) as x_raw:
            for start, stop in _runs(joinid, int(joinid[0]), int(joinid[-1]) + 1):
                first, last = np.searchsorted(joinid, [start, stop])
                length, total = np.zeros(stop - start, np.int64), np.zeros(stop - start)
                for batch in x_raw.read((_closed(start, stop), _closed(0, self.n_vars))).tables():
                    row = batch["soma_dim_0"].to_numpy() - start
                    length += np.bincount(row, minlength=stop - start)
                    total += np.bincount(row, batch["soma_data"].to_numpy(), stop - start)
                own = joinid[first:last] - start
                nnz[first:last], raw_sum[first:last] = length[own], total[own]
        return nnz, raw_sum


@nb.njit(cache=True, nogil=True)
def _place(dim_0, dim_1, data, start, row_of, offsets, cursor, more, gene, count):  # type: ignore[no-untyped-def]
    """Puts the entries of wanted rows at the rows' cursors; counts in `more` what has no room.

    A data tile holds some 50 entries of a row side by side, which are copied in one loop."""
    i = 0
    while i < len(dim_0):
        first, cell = i, dim_0[i]
        while i < len(dim_0) and dim_0[i] == cell:
            i += 1
        row = row_of[cell - start]
        if row < 0:
            continue
        at = cursor[row]
        n = min(i - first, offsets[row + 1] - at)
        for k in range(n):
            gene[at + k], count[at + k] = dim_1[first + k], data[first + k]
        cursor[row] = at + n
        more[row] += i - first - n


def _runs(joinid: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of adjacent bands that hold a wanted cell, clipped to the range given."""
    bands = np.unique(joinid // BAND)
    parts = np.split(bands, np.flatnonzero(np.diff(bands) > 1) + 1)
    return [(max(start, int(p[0]) * BAND), min(stop, int(p[-1] + 1) * BAND)) for p in parts]


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
