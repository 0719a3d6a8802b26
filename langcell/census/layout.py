"""Writing a Census: a SOMA collection in the layout of a release (Census schema 2.4.0).

What `cellxgene_census.open_soma(uri=...)` and every line behind it rely on: names, column order and types,
dictionaries, filters and tiles as the builder of the Census sets them. The embedded cells, the generated
ones of the benchmark and those of tests are written here, so that they differ in their cells alone.

X/raw is written block by block, each a fragment of its own: two bands of 2,048 cells (6.8M non-zeros) take
0.7 GB while TileDB sorts them, four take 1.2 GB, whatever the number of blocks. A block should be whole
bands: a tile that two fragments share is decoded twice.

Columns of obs and var that X tells (`nnz`, mean, variance, ...) are measured from the blocks as they pass,
as the builder does; a column that the caller gives stays as it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
import tiledbsoma as soma

from langcell.errors import InputError

SCHEMA_VERSION = "2.4.0"
ORGANISM = "homo_sapiens"

_ZSTD9, _ZSTD19 = ({"_type": "ZstdFilter", "level": level} for level in (9, 19))
_SHUFFLED = {"filters": ["ByteShuffleFilter", _ZSTD9]}

# As the Census's builder creates X/raw (tools/cellxgene_census_builder, globals.py).
_X_CONFIG = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [_ZSTD9]},
                "soma_dim_1": {"tile": 2048, **_SHUFFLED},
            },
            "attrs": {"soma_data": _SHUFFLED},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


def write_census(
    path: str, blocks: Iterable[sp.csr_matrix], obs: pa.Table, var: pa.Table, build: str = "local"
) -> None:
    """Writes the cells of `blocks` as a new Census in the local folder `path`, which must not exist.

    blocks: counts, CSR [some cells, genes], the cells of obs in their order; taken one at a time, and
    each may be dropped afterwards. obs, var: `soma_joinid` 0, 1, 2, ... and the other columns in the
    schema's order; those at its end that X tells may be left out: `raw_sum`, `nnz`, `raw_mean_nnz`,
    `raw_variance_nnz`, `n_measured_vars` of obs, `nnz`, `n_measured_obs` of var. build: the build date
    that `census_info` gives. Raises ValueError if the blocks hold another number of cells than obs.
    """
    census: soma.Collection[Any] = soma.Collection.create(path)
    with census:
        write_frame(census.add_new_collection("census_info"), "summary", _summary(obs, build))
        experiment = census.add_new_collection("census_data").add_new_collection(ORGANISM, soma.Experiment)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(len(obs), len(var)), platform_config=_X_CONFIG
        )
        by_cell, cells_of_gene = _write_x(raw, blocks, len(obs), len(var))
        write_frame(experiment, "obs", _with(obs, by_cell))
        n_measured = np.full(len(var), len(obs), np.int64)
        write_frame(rna, "var", _with(var, {"nnz": cells_of_gene, "n_measured_obs": n_measured}))


def make_var(feature_id: list[str], feature_name: list[str]) -> pa.Table:
    """var of genes of which ids and names are known, but neither biotype nor length."""
    n_genes = len(feature_id)
    return pa.table(
        {
            "soma_joinid": pa.array(range(n_genes), pa.int64()),
            "feature_id": pa.array(feature_id, pa.large_string()),
            "feature_name": pa.array(feature_name, pa.large_string()),
            "feature_type": pa.array(["unknown"] * n_genes, pa.large_string()),
            "feature_length": pa.array([0] * n_genes, pa.int64()),
        }
    )


def categorical(values: list[str] | np.ndarray) -> pa.DictionaryArray:
    """Categories as the Census stores them: large strings under the narrowest signed index."""
    encoded = pa.array(values, pa.large_string()).dictionary_encode()
    n = len(encoded.dictionary)
    index = pa.int8() if n < 2**7 else pa.int16() if n < 2**15 else pa.int32()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(index), encoded.dictionary)


def write_frame(
    parent: soma.Collection[Any] | soma.Experiment | soma.Measurement, name: str, table: pa.Table
) -> None:
    """Writes a SOMA DataFrame of the builder's tuning.

    The array is closed after its creation and opened again: a dictionary column written through a
    child of a parent that is still open loses its categories (tiledbsoma 2.3), silently, and every
    value filter then matches nothing. Raises RuntimeError if it happened all the same.
    """
    numbers = [f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    others = [name for name in table.column_names if name not in numbers]
    attributes: dict[str, Any] = {name: _SHUFFLED for name in numbers if name != "soma_joinid"}
    attributes.update((name, {"filters": [_ZSTD19]}) for name in others)
    config = {
        "tiledb": {
            "create": {
                "capacity": 2**16,
                "dims": {"soma_joinid": {"filters": ["DoubleDeltaFilter", _ZSTD19]}},
                "attrs": attributes,
                "offsets_filters": ["DoubleDeltaFilter", _ZSTD19],
                "allows_duplicates": True,
            }
        }
    }
    frame = parent.add_new_dataframe(
        name, schema=table.schema, domain=[[0, len(table) - 1]], platform_config=config
    )
    uri = frame.uri
    frame.close()
    with soma.DataFrame.open(uri, "w") as writer:
        writer.write(table)
    with soma.DataFrame.open(uri) as reader:
        for field in table.schema:
            if pa.types.is_dictionary(field.type):
                value = table[field.name][0].as_py()
                found = reader.read(value_filter=f'{field.name} == "{value}"', column_names=["soma_joinid"])
                expected = pc.sum(pc.equal(table[field.name].cast(pa.large_string()), value)).as_py()
                if len(found.concat()) != expected:
                    raise RuntimeError(f"{uri}: column {field.name} lost its categories on the way to disk")


def build_whole(path: str, write: Callable[[str], None]) -> str:
    """Lets `write` make a Census in the local folder `path` unless it stands there; its absolute path.

    A reader never sees a half-written one: it is written beside its place and renamed into it. Safe to
    call from several processes at once: the first whole one stays, the others are dropped. Raises
    InputError where something else stands in the place.
    """
    target = os.path.abspath(path)
    if soma.Collection.exists(target):
        return target
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=f".{Path(target).name}-", dir=Path(target).parent)
    try:
        whole = os.path.join(scratch, "census")
        write(whole)
        try:
            os.rename(whole, target)
        except OSError as error:
            if not soma.Collection.exists(target):  # else another process was first
                raise InputError(
                    f"cannot place the Census at {target}: {error.strerror}. Give another folder "
                    "(census.dir, or --dir of the benchmark) or remove what stands there."
                ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _summary(obs: pa.Table, build: str) -> pa.Table:
    unique = pc.sum(obs["is_primary_data"]).as_py() if "is_primary_data" in obs.column_names else len(obs)
    return pa.table(
        {
            "soma_joinid": pa.array(range(4), pa.int64()),
            "label": ["census_schema_version", "census_build_date", "total_cell_count", "unique_cell_count"],
            "value": [SCHEMA_VERSION, build, str(len(obs)), str(unique)],
        }
    )


def _write_x(
    raw: soma.SparseNDArray, blocks: Iterable[sp.csr_matrix], n_cells: int, n_genes: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Writes the blocks one below the other; what they tell of each cell, and the cells of each gene."""
    start, cells_of_gene = 0, np.zeros(n_genes, np.int64)
    measured = [_measure(sp.csr_matrix((0, n_genes), dtype=np.float32))]
    for block in blocks:
        row = np.repeat(np.arange(start, start + block.shape[0], dtype=np.int64), np.diff(block.indptr))
        table = {"soma_dim_0": row, "soma_dim_1": block.indices.astype(np.int64)}
        raw.write(pa.table(table | {"soma_data": block.data.astype(np.float32, copy=False)}))
        measured.append(_measure(block))
        cells_of_gene += np.bincount(block.indices, minlength=n_genes)
        start += block.shape[0]
    if start != n_cells:
        raise ValueError(f"the blocks of X hold {start} cells, obs {n_cells}")
    return {name: np.concatenate([part[name] for part in measured]) for name in measured[0]}, cells_of_gene


def _measure(block: sp.csr_matrix) -> dict[str, np.ndarray]:
    """Columns of obs, in the schema's order, that the counts of some cells tell."""
    n_cells, n_genes = block.shape
    nnz = np.diff(block.indptr).astype(np.int64)
    row, count = np.repeat(np.arange(n_cells), nnz), block.data.astype(np.float64)
    total = np.bincount(row, count, n_cells)
    with np.errstate(invalid="ignore", divide="ignore"):  # a cell of less than two counts has no variance
        mean = total / nnz
        variance = np.bincount(row, (count - mean[row]) ** 2, n_cells) / (nnz - 1)
    return {
        "raw_sum": total,
        "nnz": nnz,
        "raw_mean_nnz": mean,
        "raw_variance_nnz": variance,
        "n_measured_vars": np.full(n_cells, n_genes, np.int64),
    }


def _with(table: pa.Table, measured: dict[str, np.ndarray]) -> pa.Table:
    for name, values in measured.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array(values))
    return table
