"""beta: the median of each gene's non-zero normalised counts over a corpus, exact.

Sketches are off by up to 2% (t-digest; KLL far more on rare genes) and depend on the order of merging,
so two runs over the same cells rank genes differently. A median needs no sketch: it is a selection by
rank, done here on the float32 image of the values in two passes, as a radix selection does.

1. `histogram`: count the values of each gene by the top 16 bits of their image (sign, exponent, 7 bits
   of mantissa: bins 0.8% wide). The bin of the middle rank follows (`median_bins`).
2. `collect`: count the values in that bin, or in the two bins that the two middle ranks of an even
   number fall in, by all 32 bits: 0.33% of the values. The value at the middle rank is the median
   (`finish`): bit for bit `numpy.median` of the gene's float32 values.

Partial results are sparse integer counts in both passes and merge by addition: any slicing, any order
and any tree of merging give the same bits, and a partial is returned, not added to shared state, so
that a task may run again. Images are positive, so they sort as integers.

Cost: 16 bytes a bin, about 5-10 KB a gene in the first pass for any number of cells, less in the
second, where equal values (few counts over few totals) share an entry. About 50M values a second and
core in the first pass and 100M in the second, next to 20-50M that a core reads.

Own medians are float32 (1e-7 from a median in float64). Published ones keep the precision that they
were published in: Geneformer's as float32 would change the sentences of 11 of 3,874 real cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from pyarrow import fs

from langcell.cells.normalize import normalize
from langcell.cells.pickles import is_pickle, read_pickle_dict
from langcell.errors import InputError

_NONE = np.uint16(0xFFFF)  # a bin that no positive number falls in


@dataclass(frozen=True)
class Histogram:
    """How many values fall in each bin that holds one.

    code: int64, ascending: gene << 16 | top 16 bits of the value's float32 image in the first pass,
    gene << 32 | all 32 bits in the second; count: int64, positive.
    """

    code: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class MedianBins:
    """The bins (top 16 bits, uint16 [genes]) of each gene's lower and upper middle value; they differ at
    most where the number of values is even. 0xFFFF, which no value has, for a gene without values."""

    low: np.ndarray
    high: np.ndarray


def histogram(counts: sp.csr_matrix, totals: np.ndarray) -> Histogram:
    """First pass over some cells: counts CSR [cells, genes], totals float64 [cells]."""
    gene, image = _images(counts, totals)
    code, count = _count_by_gene(gene, (image >> 16).astype(np.uint16), counts.shape[1])
    return Histogram(code, count)


def collect(counts: sp.csr_matrix, totals: np.ndarray, bins: MedianBins) -> Histogram:
    """Second pass over the same cells: the values in the bins of the medians."""
    gene, image = _images(counts, totals)
    top = (image >> 16).astype(np.uint16)
    inside = np.flatnonzero((top == bins.low[gene]) | (top == bins.high[gene]))
    code = np.sort(gene[inside].astype(np.int64) << 32 | image[inside])
    return _add_runs(code, np.ones(len(code), np.int64))


def merge_histograms(parts: Iterable[Histogram]) -> Histogram:
    """The histogram of all cells of `parts`, of either pass, whatever their order."""
    parts = list(parts)
    code = np.concatenate([np.empty(0, np.int64), *(part.code for part in parts)])
    count = np.concatenate([np.empty(0, np.int64), *(part.count for part in parts)])
    order = np.argsort(code, kind="stable")
    return _add_runs(code[order], count[order])


def median_bins(hist: Histogram, n_genes: int) -> MedianBins:
    """Where each gene's middle values lie, from the merged histogram of the first pass."""
    n, low, high, _ = _middle(hist, n_genes)
    top = np.append(hist.code & 0xFFFF, _NONE).astype(np.uint16)
    low[n == 0] = high[n == 0] = len(hist.code)
    return MedianBins(top[low], top[high])


def finish(
    hist: Histogram,
    bins: MedianBins,
    collected: Histogram,
    feature_id: Sequence[str],
    feature_name: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> Beta:
    """The medians, from the merged results of both passes; genes in the order of var.

    metadata: what the cells were (release, filter, number). Raises RuntimeError if the second pass saw
    other values than the first.
    """
    n_genes = len(feature_id)
    n, _, _, before = _middle(hist, n_genes)
    here = hist.code >> 16
    is_middle = (hist.code & 0xFFFF == bins.low[here]) | (hist.code & 0xFFFF == bins.high[here])
    expected = _total_by_gene(here[is_middle], hist.count[is_middle], n_genes)
    if not np.array_equal(_total_by_gene(collected.code >> 32, collected.count, n_genes), expected):
        raise RuntimeError("the two passes over the counts did not see the same cells")

    beta = np.full(n_genes, np.nan, np.float32)
    known = np.flatnonzero(n)
    if len(known):
        # Ranks among the collected values of all genes, which are sorted by gene, then value.
        start = (np.cumsum(expected) - expected)[known] - before[known]
        ends = np.cumsum(collected.count)
        middle = [start + (n[known] - 1) // 2, start + n[known] // 2]
        value = (collected.code & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        lower, upper = (value[np.searchsorted(ends, rank, side="right")] for rank in middle)
        beta[known] = (lower + upper) / np.float32(2)
    about = {"method": "exact median of the non-zero normalised counts (float32)", "error_bound": "0"}
    return Beta(list(feature_id), list(feature_name), n, beta, about | dict(metadata or {}))


@dataclass(frozen=True, eq=False)
class Beta:
    """The artefact: what the normalised counts of a gene are divided by, in this and any later use.

    feature_id, feature_name: genes in the order of var; n_nonzero: int64 [genes], cells with the gene;
    beta: [genes], counts per ten thousand, NaN for a gene in no cell, float32 (float64 where published
    so); metadata: where it is from.
    """

    feature_id: list[str]
    feature_name: list[str]
    n_nonzero: np.ndarray
    beta: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hex digest of the content: gene ids, n_nonzero and the bits of beta."""
        digest = blake2b("\n".join(self.feature_id).encode(), digest_size=16)
        digest.update(self.n_nonzero.astype("<i8").tobytes())
        one_nan = np.where(np.isnan(self.beta), self.beta.dtype.type(np.nan), self.beta)
        digest.update(one_nan.astype(self.beta.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def without(self, genes: Iterable[str], metadata: Mapping[str, str]) -> Beta:
        """The same but for some genes (ids), with more metadata."""
        left_out = set(genes)
        kept = [i for i, gene in enumerate(self.feature_id) if gene not in left_out]
        return Beta(
            [self.feature_id[i] for i in kept],
            [self.feature_name[i] for i in kept],
            self.n_nonzero[kept],
            self.beta[kept],
            {**self.metadata, **metadata},
        )

    def write(self, path: str, filesystem: fs.FileSystem | None = None) -> None:
        """Writes Parquet: feature_id, feature_name, n_nonzero, beta; hash and metadata in the schema."""
        table = pa.table(
            {
                "feature_id": self.feature_id,
                "feature_name": self.feature_name,
                "n_nonzero": self.n_nonzero,
                "beta": self.beta,
            }
        )
        about = json.dumps({"hash": self.hash, "metadata": self.metadata}, sort_keys=True)
        pq.write_table(table.replace_schema_metadata({"langcell": about}), path, filesystem=filesystem)

    @classmethod
    def read(cls, path: str, filesystem: fs.FileSystem | None = None) -> Beta:
        """Reads what `write` wrote. Raises InputError if it is something else, or damaged."""
        try:
            table = pq.read_table(path, filesystem=filesystem)
            about = json.loads(table.schema.metadata[b"langcell"])
            beta = cls(
                table["feature_id"].to_pylist(),
                table["feature_name"].to_pylist(),
                table["n_nonzero"].to_numpy(),
                table["beta"].to_numpy(),
                about["metadata"],
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise InputError(f"beta: {path} is not a beta.parquet of langcell ({error!r})") from error
        if beta.hash != about["hash"]:
            raise InputError(f"beta: {path} is damaged: its content does not give its hash {about['hash']}")
        return beta

    @classmethod
    def from_geneformer(cls, pickle_path: str) -> Beta:
        """Geneformer's published medians (gene id -> median), read by a restricted reader.

        They say nothing of how many cells had a gene: n_nonzero is 0.
        """
        medians = read_pickle_dict(pickle_path)
        beta = np.array(list(medians.values()))
        if not len(beta) or beta.dtype != np.float64 or not (np.isfinite(beta) & (beta > 0)).all():
            raise InputError(f"{pickle_path}: a dictionary from gene ids to positive medians is expected")
        nothing = np.zeros(len(medians), np.int64)
        about = {"method": "median dictionary of Geneformer"}
        return cls(list(medians), [""] * len(medians), nothing, beta, about)

    @classmethod
    def load(cls, source: str) -> Beta:
        """`beta.source`: a beta.parquet (path or URI), or Geneformer's dictionary (.pkl)."""
        return cls.from_geneformer(source) if is_pickle(source) else cls.read(source)


def _images(counts: sp.csr_matrix, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gene (int32) and float32 image (uint32) of the normalised value of each non-zero entry."""
    gene, image = counts.indices, normalize(counts, totals).astype(np.float32).view(np.uint32)
    if image.all():
        return gene, image
    stored_zero = image == 0
    return gene[~stored_zero], image[~stored_zero]


@nb.njit(cache=True, nogil=True)
def _count_by_gene(gene, top, n_genes):  # type: ignore[no-untyped-def]
    """Occupied bins of each gene: a counting sort by gene, then a tally that stays in the cache."""
    start = np.zeros(n_genes + 1, np.int64)
    for g in gene:
        start[g + 1] += 1
    for g in range(n_genes):
        start[g + 1] += start[g]
    by_gene = np.empty(len(gene), np.uint16)
    cursor = start[:-1].copy()
    for i in range(len(gene)):
        by_gene[cursor[gene[i]]] = top[i]
        cursor[gene[i]] += 1

    tally = np.zeros(1 << 16, np.int64)
    code, count = np.empty(1 << 16, np.int64), np.empty(1 << 16, np.int64)
    n = 0
    for g in range(n_genes):
        if start[g] == start[g + 1]:
            continue
        first, last = 1 << 16, 0
        for i in range(start[g], start[g + 1]):
            tally[by_gene[i]] += 1
            first, last = min(first, by_gene[i]), max(last, by_gene[i])
        if n + last + 1 - first > len(code):
            room = 2 * len(code) + (1 << 16)
            wider_code, wider_count = np.empty(room, np.int64), np.empty(room, np.int64)
            wider_code[:n], wider_count[:n] = code[:n], count[:n]
            code, count = wider_code, wider_count
        for b in range(first, last + 1):  # without a branch: an empty bin is overwritten by the next
            code[n], count[n] = (g << 16) | b, tally[b]
            n += tally[b] != 0
            tally[b] = 0
    return code[:n].copy(), count[:n].copy()


def _add_runs(code: np.ndarray, count: np.ndarray) -> Histogram:
    """One entry for each run of equal codes (ascending), their counts added."""
    if not len(code):
        return Histogram(code, count)
    first = np.flatnonzero(np.concatenate([[True], code[1:] != code[:-1]]))
    return Histogram(code[first], np.add.reduceat(count, first))


def _total_by_gene(gene: np.ndarray, count: np.ndarray, n_genes: int) -> np.ndarray:
    total = np.zeros(n_genes, np.int64)
    np.add.at(total, gene, count)
    return total


def _middle(hist: Histogram, n_genes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per gene: number of values, entries of the lower and of the upper middle value, and the number
    of values below the former's bin (int64 [genes]; meaningless for a gene without values)."""
    ends = np.cumsum(hist.count)
    before_entry = ends - hist.count
    n = _total_by_gene(hist.code >> 16, hist.count, n_genes)
    before_gene = np.cumsum(n) - n
    low = np.searchsorted(ends, before_gene + (n - 1) // 2, side="right")
    high = np.searchsorted(ends, before_gene + n // 2, side="right")
    before = np.append(before_entry, 0)[np.minimum(low, len(ends))] - before_gene
    return n, low, high, before
