"""Folders of token sentences in every layout, for the tests that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from langcell.cells.vocabulary import Vocabulary
from langcell.census.options import CensusOptions
from langcell.census.slices import Sentences
from langcell.census.tokenised import TokenisedFolder

GENES = Vocabulary([f"ENSG{i:011d}" for i in range(50)])
CLS = GENES.cls
ALL = "is_primary_data == True"
Write = Callable[[Path, pa.Table], None]


def save(folder: Path, table: pa.Table, shards: int = 3, batch: int = 7) -> None:
    """What `datasets.Dataset.save_to_disk` leaves: streams of small batches, named by a state."""
    folder.mkdir(parents=True)
    cuts = np.linspace(0, len(table), shards + 1).astype(int)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for name, start, stop in zip(names, cuts, cuts[1:], strict=False):
        with ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(start, stop - start), batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def save_dict(folder: Path, table: pa.Table) -> None:
    """What `datasets.DatasetDict.save_to_disk` leaves; the splits are not in the order of their names."""
    half = len(table) // 2
    save(folder / "train", table.slice(0, half), shards=1)
    save(folder / "test", table.slice(half), shards=2)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def hub(folder: Path, table: pa.Table) -> None:
    """Parquet as it is downloaded from a hub, the client's cache beside it."""
    for i in range(3):
        path = folder / "data" / f"train-{i:05d}-of-00003.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = table.slice(i * len(table) // 3, (i + 1) * len(table) // 3 - i * len(table) // 3)
        pq.write_table(rows, path, row_group_size=11)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "stale.parquet").write_bytes(b"")


LAYOUTS = pytest.mark.parametrize("write", [save, save_dict, hub])


def corpus(n: int = 200, seed: int = 0, columns: dict[str, object] | None = None) -> pa.Table:
    """Sentences of 0 to 30 genes, a third of them as LangCell writes them and a third padded."""
    rng = np.random.default_rng(seed)
    cells = []
    for i in range(n):
        genes = rng.permutation(np.arange(2, CLS))[: rng.integers(0, 31)].tolist()
        cells.append([[], [CLS]][i % 3 == 1] + genes + [0] * (i % 3 == 2) * int(rng.integers(0, 4)))
    return pa.table({"input_ids": pa.array(cells, pa.list_(pa.int32())), **(columns or {})})


def expected(ids: list[int | None] | None, max_length: int) -> list[int] | None:
    """One sentence, by the words of the module; None for one that does not fit."""
    genes = list(ids or [])
    while genes and genes[-1] == 0:
        genes.pop()
    if genes and genes[0] == CLS:
        genes = genes[1:]
    if any(gene is None or not 2 <= gene < CLS for gene in genes):
        return None
    return [CLS, *genes][:max_length]  # type: ignore[list-item]


def unpacked(got: Sentences) -> list[list[int] | None]:
    assert got.tokens.dtype == np.uint16
    assert got.offsets.dtype == np.int64
    cells = np.split(got.tokens, got.offsets[1:-1])
    assert len(cells) == len(got.fits)
    assert all(fits or not len(cell) for cell, fits in zip(cells, got.fits, strict=True))
    return [cell.tolist() if fits else None for cell, fits in zip(cells, got.fits, strict=True)]


def opened(folder: Path, filter: str = ALL, obs_map: str | None = None) -> TokenisedFolder:
    return TokenisedFolder.open(CensusOptions(uri=str(folder), filter=filter, obs_map=obs_map))
