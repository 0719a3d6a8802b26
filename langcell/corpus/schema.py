"""What stands in a corpus: the splits, and the Arrow schema of token blocks and of the text table.

A cell of a block is its sentence of genes, without padding, and three keys: the joinid, the id of its
text (a text never travels with a cell) and the cell-type term. Parquet has no 16-bit integer and stores
tokens as INT32; byte-stream-split sends the two empty bytes of each to zstd as runs of zeros, which
costs 1.84 bytes a token where plain zstd takes 2.31 and the dictionary encoding that Parquet would
choose by itself more. The term is a string, so that a block can be read alone; Parquet's dictionary
makes it small.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

SPLITS = ("train", "val", "test", "held_out")
TRAIN, VAL, TEST, HELD_OUT = range(len(SPLITS))

BLOCK_SCHEMA = pa.schema(
    [
        pa.field("soma_joinid", pa.int64(), nullable=False),
        pa.field("tokens", pa.list_(pa.field("element", pa.uint16(), nullable=False)), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("text_id", pa.int64(), nullable=False),
        pa.field("term", pa.string(), nullable=False),
    ]
)
"""A cell: `tokens` with `<cls>` first, `length` of them; `term`: CL id of its cell type or ''."""

BLOCK_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["text_id", "term"],
    "use_byte_stream_split": ["tokens.list.element"],
    "write_statistics": ["soma_joinid", "length"],
    "write_batch_size": 1 << 16,
}
"""Keyword arguments of `pyarrow.parquet.write_table` for a block. The least and the largest token say
nothing: without them, and in larger steps, a block is written in a tenth less time."""


def block_name(split: str, slice_index: int) -> str:
    """Name of the cells of one slice and split, relative to the corpus folder."""
    return f"blocks/{split}/slice-{slice_index:06d}.parquet"


def text_schema(facets: list[str]) -> pa.Schema:
    """Schema of the text table for the facets that stand in the texts.

    `variants`: the full text, then its shortened ones, the cell type alone last; `term`: CL id of the
    cell type or ''; `ancestors`: its is_a closure; one column of ontology ids a facet; `n_<split>`:
    cells of each split that have the text.
    """
    strings = pa.list_(pa.string())
    return pa.schema(
        [("text_id", pa.int64()), ("variants", strings), ("term", pa.string()), ("ancestors", strings)]
        + [(f"{facet}_ontology_term_id", pa.string()) for facet in facets]
        + [(f"n_{split}", pa.int64()) for split in SPLITS]
    )
