"""Samples of a split: the cells that were drawn, in corpus order, whatever row groups they lie in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langcell.corpus.blocks import row_groups, sample_cells
from langcell.corpus.manifest import Block, Manifest
from langcell.corpus.plan import RowGroups
from langcell.corpus.schema import BLOCK_SCHEMA

GROUPS = [[20, 20, 10], [7], [20, 3]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """Three train blocks in row groups of up to 20; joinids and the first token are places in the split."""
    root = tmp_path_factory.mktemp("corpus")
    blocks, first = [], 0
    for index, groups in enumerate(GROUPS):
        joinid = np.arange(first, first + sum(groups))
        tokens = [[int(j)] * (1 + j % 3) for j in joinid]
        columns = [joinid, tokens, [len(t) for t in tokens], joinid, [""] * len(joinid)]
        pq.write_table(pa.table(columns, schema=BLOCK_SCHEMA), root / f"{index}.parquet", row_group_size=20)
        blocks.append(Block(f"{index}.parquet", 0, "", "train", len(joinid), groups, 0))
        first += len(joinid)
    return str(root), Manifest("", {}, "", "", "", {}, {}, {}, blocks, [], {})


@pytest.mark.parametrize("most", [0, 1, 9, 40, 80, 1000])
def test_a_sample_is_of_the_cells_that_were_drawn(corpus: tuple[str, Manifest], most: int) -> None:
    directory, manifest = corpus
    sample = sample_cells(directory, manifest, "train", most, 5, ["soma_joinid", "tokens"])
    drawn = np.sort(np.random.default_rng(5).permutation(80)[:most]).tolist()
    assert sample["soma_joinid"].to_pylist() == drawn
    assert sample["tokens"].to_pylist() == [[j] * (1 + j % 3) for j in drawn]


def test_no_cells_of_a_split_are_an_empty_sample(corpus: tuple[str, Manifest]) -> None:
    directory, manifest = corpus
    assert len(sample_cells(directory, manifest, "val", 9, 5, ["tokens"])) == 0


def test_row_groups_are_those_of_the_split(corpus: tuple[str, Manifest]) -> None:
    _, manifest = corpus
    other = replace(manifest.blocks[1], file="val.parquet", split="val")
    manifest = replace(manifest, blocks=[*manifest.blocks, other])
    wanted = tuple(RowGroups(f"{index}.parquet", tuple(rows)) for index, rows in enumerate(GROUPS))
    assert row_groups(manifest, "train") == wanted
    assert row_groups(manifest, "val") == (RowGroups("val.parquet", (7,)),)
