"""Corpora for tests: `prepare` with small options, and all that stands in the blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from langcell.cells.options import BetaOptions, TokenOptions
from langcell.census.options import CensusOptions
from langcell.corpus.options import CorpusOptions
from langcell.corpus.prepare import PrepareSummary, prepare
from langcell.corpus.schema import SPLITS
from langcell.text.options import TextOptions

HELD_OUT = ["CL:0001054"]  # 129 of the 700 cells
MAX_LENGTH = 200  # about half of the cells have more genes
ROW_GROUP = 100


def make(demo_uri: str, dir: Path, held_out: list[str] = HELD_OUT, **changes) -> PrepareSummary:
    """`prepare` of the embedded Census, with options changed by their dotted names."""
    options = {
        "census": CensusOptions(uri=demo_uri),
        "beta": BetaOptions(),
        "tokens": TokenOptions(max_length=MAX_LENGTH),
        "text": TextOptions(short_variants=1),
        "corpus": CorpusOptions(dir=str(dir), row_group_cells=ROW_GROUP),
    }
    for name, value in changes.items():
        room, field = name.split("__")
        options[room] = replace(options[room], **{field: value})
    return prepare(**options, held_out_types=held_out, held_out_datasets=[])


def read_blocks(dir: Path) -> dict[int, tuple]:
    """(split, tokens, length, text_id, term) of every cell of a corpus, by joinid."""
    cells = {}
    for split in SPLITS:
        for path in sorted((dir / "blocks" / split).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                joinid = row.pop("soma_joinid")
                assert joinid not in cells
                cells[joinid] = (split, *row.values())
    return cells
