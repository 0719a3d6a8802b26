"""Slices to token blocks, a Ray Data graph: read, rank-encode, write, fused into one task a slice.

Rows out are small reports. A block stays in one piece (`tasks`), for a piece of a slice would be written
over the other.

A finished slice leaves a report beside the blocks until the corpus is whole: a run that was killed goes on
with the slices that have none. A report is written after its blocks, each whole or absent; what a worker
that died left is overwritten, or swept away at the end.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import scipy.sparse as sp
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.cells.faults import Fault
from langcell.cells.rank import rank_encode
from langcell.cells.vocabulary import Vocabulary
from langcell.census.datasource import SliceSource
from langcell.census.reading import counts_of, patiently
from langcell.corpus.ledger import SliceFaults
from langcell.corpus.manifest import Block
from langcell.corpus.progress import Progress
from langcell.corpus.schema import BLOCK_ENCODING, BLOCK_SCHEMA, SPLITS, block_name
from langcell.corpus.tasks import graph
from langcell.errors import InputError
from langcell.storage import digest, open_root, write_file


@dataclass(frozen=True)
class Encoder:
    """Counts to sentences. beta_by_var: float64 [n_vars]; token_by_var: uint16 [n_vars], 0 for none; cls:
    token; max_length: most tokens of a cell."""

    beta_by_var: np.ndarray
    token_by_var: np.ndarray
    cls: int
    max_length: int

    @classmethod
    def of(cls, medians: Beta, vocabulary: Vocabulary, feature_id: list[str], max_length: int) -> Encoder:
        """For slices whose columns are the genes `feature_id`; an id that stands twice there is left out, for
        no count of one can be told from the other's. Raises InputError where no gene is left."""
        median_of = dict(zip(medians.feature_id, medians.beta, strict=True))
        once = {gene for gene, times in Counter(feature_id).items() if times == 1}
        encoder = cls(
            beta_by_var=np.array(
                [median_of.get(gene, np.nan) if gene in once else np.nan for gene in feature_id], np.float64
            ),
            token_by_var=vocabulary.tokens_of(feature_id),
            cls=vocabulary.cls,
            max_length=max_length,
        )
        if not encoder.genes:
            raise InputError(
                f"None of the {len(feature_id)} genes of the Census ({feature_id[0]}, ...) has a median and "
                "a token: the medians or the vocabulary are of other gene ids."
            )
        return encoder

    @property
    def genes(self) -> int:
        """Genes that can stand in a sentence: they have a token and a median."""
        return int(((self.token_by_var > 0) & (self.beta_by_var > 0)).sum())

    def __call__(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sentences of the cells of a `counts_block`: offsets (int64 [cells + 1]), tokens (uint16), and the
        cells' faults (uint8), those whose sentence would be `<cls>` alone among them."""
        counts = counts_of(table, len(self.beta_by_var))
        return self.encode(counts, table["raw_sum"].to_numpy(), table["fault"].to_numpy())

    def encode(
        self, counts: sp.csr_matrix, totals: np.ndarray, fault: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of counts [cells, n_vars], the cells' totals and the faults that are known of them."""
        fault = fault.copy()
        sound = np.flatnonzero(fault == Fault.NONE)
        if len(sound) < len(fault):
            counts, totals = counts[sound], totals[sound]
        offsets, tokens = rank_encode(
            counts, totals, self.beta_by_var, self.token_by_var, self.cls, self.max_length
        )
        length = np.zeros(len(fault), np.int64)
        length[sound] = np.diff(offsets)
        fault[sound[length[sound] <= 1]] = Fault.NO_GENE
        return np.concatenate([[0], np.cumsum(length)]), tokens, fault


@dataclass(frozen=True)
class BlockWriter:
    """Where sentences go. dir: the corpus; made_with: digest of the medians and the vocabulary;
    row_group_cells: cells of a row group; attempts: times that a write is tried, on storage that fails now
    and then."""

    dir: str
    made_with: str
    row_group_cells: int
    attempts: int

    def __call__(
        self, table: pa.Table, offsets: np.ndarray, tokens: np.ndarray, fault: np.ndarray
    ) -> SliceReport:
        """Write the token files of one block, sentences as of `Encoder`, and then its report."""
        index = table["slice"][0].as_py()
        cells = pa.table(
            [
                table["soma_joinid"],
                pa.ListArray.from_arrays(offsets.astype(np.int32), tokens, BLOCK_SCHEMA.field("tokens").type),
                np.diff(offsets).astype(np.int32),
                table["text_id"],
                table["term"].cast(pa.string()),
            ],
            schema=BLOCK_SCHEMA,
        )
        split = table["split"].to_numpy()
        root, blocks = open_root(self.dir), []
        for code, name in enumerate(SPLITS):
            rows = (split == code) & (fault == Fault.NONE)
            if rows.any():
                chosen = cells if rows.all() else cells.filter(pa.array(rows))
                blocks.append(self._write(root, chosen, name, index))
        faults = SliceFaults.of(index, table["soma_joinid"].to_numpy(), fault, table["reason"][0].as_py())
        report = SliceReport(index, self.made_with, blocks, faults)
        if not faults.unreadable:  # else another run shall try again
            write_file(root, report_name(index), report.to_json().encode())
        return report

    def _write(self, root: fs.FileSystem, cells: pa.Table, split: str, index: int) -> Block:
        sink = pa.BufferOutputStream()
        pq.write_table(cells, sink, row_group_size=self.row_group_cells, **BLOCK_ENCODING)
        data = sink.getvalue()
        name = block_name(split, index)
        write_file(root, name, data)
        whole, rest = divmod(cells.num_rows, self.row_group_cells)
        return Block(
            file=name,
            bytes=data.size,
            hash=digest(data),
            split=split,
            rows=cells.num_rows,
            row_groups=[self.row_group_cells] * whole + [rest] * (rest > 0),
            tokens=pc.sum(cells["length"]).as_py(),
        )


@dataclass(frozen=True)
class SliceReport:
    """What came of a slice: its files, and the cells that are in none of them. made_with: of which medians
    and vocabulary."""

    slice: int
    made_with: str
    blocks: list[Block]
    faults: SliceFaults

    def to_json(self) -> str:
        return json.dumps(
            {
                "slice": self.slice,
                "made_with": self.made_with,
                "blocks": [asdict(block) for block in self.blocks],
                "faults": [self.faults.soma_joinid.tolist(), self.faults.fault.tolist(), self.faults.reason],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> SliceReport:
        content = json.loads(text)
        joinid, fault, reason = content["faults"]
        faults = SliceFaults(content["slice"], np.array(joinid, np.int64), np.array(fault, np.uint8), reason)
        return cls(content["slice"], content["made_with"], [Block(**b) for b in content["blocks"]], faults)


def report_name(slice_index: int) -> str:
    """Name of the report that a finished slice leaves until the corpus is whole."""
    return f"unfinished/slice-{slice_index:06d}.json"


Encode = Callable[[pa.Table], tuple[np.ndarray, np.ndarray, np.ndarray]]


def write_tokens(
    source: SliceSource, encode: Encode, writer: BlockWriter, note: Callable[[SliceFaults], None]
) -> list[SliceReport]:
    """Write the token blocks of the slices of `source`; the reports in any order.

    encode: sentences and faults of a block (`Encoder`). Slice cells have `text_id`, `term` and `split`.
    note: takes the faults of each slice as it ends, and may raise InputError for them.
    """
    if not source.slices:
        return []
    cells_of_slice = {part.index: len(part.cells) for part in source.slices}
    reports = []
    with graph() as retries, Progress("tokens", len(source.slices)) as progress:
        rows = (
            ray.data.read_datasource(source, override_num_blocks=len(source.slices), ray_remote_args=retries)
            .map_batches(
                functools.partial(encode_block, encode=encode, writer=writer, cells_of_slice=cells_of_slice),
                batch_format="pyarrow",
                batch_size=None,
                **retries,
            )
            .iter_rows()
        )
        for row in rows:
            report = SliceReport.from_json(row["report"])
            reports.append(report)
            note(report.faults)
            progress.add(cells_of_slice[report.slice])
    return reports


def encode_block(
    table: pa.Table, encode: Encode, writer: BlockWriter, cells_of_slice: dict[int, int]
) -> pa.Table:
    """Encode and write one slice; a row with its report.

    Raises RuntimeError for a piece of a slice, which would pass for the whole.
    """
    index = table["slice"][0].as_py()
    if table.num_rows != cells_of_slice[index]:
        raise RuntimeError(f"slice {index} came in pieces: {table.num_rows} of {cells_of_slice[index]} cells")
    sentences = encode(table)
    report = patiently(writer.attempts)(writer, table, *sentences)
    return pa.table({"report": [report.to_json()]})
