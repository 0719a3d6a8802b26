"""How the slices of a source become sentences: counts are ranked, sentences of others are taken as they are.

A `Road` is all that the token pass needs to know of it, so that everything before (obs, texts, splits,
slices) and behind (blocks, reports, manifest) is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.cells.faults import Fault
from langcell.cells.vocabulary import Vocabulary
from langcell.census.reading import counts_block, counts_bytes, sentences_block, sentences_bytes
from langcell.census.slices import Slice, Source
from langcell.census.tokenised import TokenisedFolder
from langcell.corpus.beta_pass import train_beta
from langcell.corpus.draft import Draft, Order
from langcell.corpus.ledger import Ledger, SliceFaults
from langcell.corpus.token_pass import Encode, Encoder
from langcell.storage import digest_json, sizes

OWN_BETA = "unfinished/beta.parquet"
_LOST = "unreadable_slices"


@dataclass(frozen=True)
class Road:
    """From slices to sentences.

    genes: genes that can stand in one; block_of, bytes_of: what reads a slice, and the bytes of its block;
    encode: sentences and faults of a block; lost: slices (indices) that cannot be read.
    """

    beta: Beta
    vocabulary: Vocabulary
    genes: int
    block_of: Callable[[Slice], pa.Table]
    bytes_of: Callable[[Slice], int]
    encode: Encode
    lost: set[int] = field(default_factory=set)

    @property
    def made_with(self) -> str:
        """Digest of what, beside the slice, a sentence is made with."""
        return digest_json([self.beta.hash, self.vocabulary.hash])


def take_road(order: Order, drafted: Draft, root: fs.FileSystem, ledger: Ledger) -> Road:
    """The road of the source's kind; beta is computed here, unless it is given or was finished before.

    Raises InputError where no gene has both a token and a median, and for cells that the ledger refuses.
    """
    source, attempts = order.source, order.census.attempts
    if isinstance(source, TokenisedFolder):
        medians, vocabulary = order.made_with()
        reader = source.reader_for(vocabulary, order.tokens.max_length)
        return Road(
            medians,
            vocabulary,
            len(vocabulary.gene_ids),
            partial(sentences_block, reader, attempts),
            sentences_bytes,
            take_sentences,
        )
    none_lost: set[int] = set()
    medians, lost = (order.beta, none_lost) if order.beta else _own_beta(source, order, drafted, root, ledger)
    vocabulary = order.vocabulary or Vocabulary.from_beta(medians)
    encoder = Encoder.of(medians, vocabulary, drafted.var["feature_id"].to_pylist(), order.tokens.max_length)
    return Road(
        medians,
        vocabulary,
        encoder.genes,
        partial(counts_block, source.reader, attempts),
        counts_bytes,
        encoder,
        lost,
    )


def take_sentences(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Encoder` gives, of a `sentences_block`."""
    tokens = table["tokens"].combine_chunks()
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    fault = table["fault"].to_numpy().copy()
    fault[(fault == Fault.NONE) & (np.diff(offsets) <= 1)] = Fault.NO_GENE
    return offsets - offsets[0], tokens.flatten().to_numpy(), fault


def _own_beta(
    source: Source, order: Order, drafted: Draft, root: fs.FileSystem, ledger: Ledger
) -> tuple[Beta, set[int]]:
    """The medians of the train split, kept so that an interrupted run need not read X for them again, and
    the slices that cannot be read."""
    stands = sizes(root, [OWN_BETA]) != [None]
    if stands and ledger.strict and _LOST in Beta.read(OWN_BETA, root).metadata:
        stands = False  # made under another policy, without slices that may be mended by now
    if not stands:
        about = {key: str(value) for key, value in source.release.items() if key != "files"}
        trained = train_beta(source.reader, order.census.attempts, drafted.var, drafted.slices, ledger, about)
        lost = {_LOST: " ".join(map(str, trained.unreadable))} if trained.unreadable else {}
        medians = trained.beta.without(drafted.duplicated, lost)
        medians.write(f"{OWN_BETA}.tmp", root)
        root.move(f"{OWN_BETA}.tmp", OWN_BETA)
    medians = Beta.read(OWN_BETA, root)
    lost_slices = {int(index) for index in medians.metadata.get(_LOST, "").split()}
    for part in drafted.slices:
        if part.index in lost_slices:
            joinid = part.cells["soma_joinid"].to_numpy()
            fault = np.full(len(joinid), Fault.UNREADABLE, np.uint8)
            ledger.add(SliceFaults(part.index, joinid, fault, "it could not be read for the medians"))
    return medians, lost_slices
