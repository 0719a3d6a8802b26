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

Cost: 16 bytes a bin. The bins that some cell occupies grow slowly with the cells (generated Census, 60,000
genes): 57 MB at 4,000 cells, 320 MB at 100,000, about 700 MB at 27.5M by the law that fits these. So a
histogram is cut into ranges of genes (`by_gene_range`), each reduced by itself; two merge in one linear
sweep. The second pass is smaller: 0.33% of the values, and equal ones (few counts over few totals) share an
entry. Nothing but the partial itself is held beside the counts.

Own medians are float32 (1e-7 from a median in float64). Published ones keep the precision that they
were published in: Geneformer's as float32 would change the sentences of 11 of 3,874 real cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from pyarrow import fs

from langcell.cells.normalize import SCALE
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

    def by_gene_range(self, n_genes: int, ranges: int, bits: int) -> list[Histogram]:
        """The parts of `ranges` equal ranges of genes. bits: of a code that are the value's (16 or 32)."""
        first_gene = np.linspace(0, n_genes, ranges + 1).astype(np.int64)
        ends = np.searchsorted(self.code, first_gene << bits)
        return [Histogram(self.code[a:b].copy(), self.count[a:b].copy()) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class MedianBins:
    """The bins (top 16 bits, uint16 [genes]) of each gene's lower and upper middle value; they differ at
    most where the number of values is even. 0xFFFF, which no value has, for a gene without values."""

    low: np.ndarray
    high: np.ndarray


def histogram(counts: sp.csr_matrix, totals: np.ndarray) -> Histogram:
    """First pass over some cells: counts CSR [cells, genes], totals float64 [cells]."""
    return Histogram(*_count_bins(counts.data, counts.indices, counts.indptr, totals, counts.shape[1]))


def collect(counts: sp.csr_matrix, totals: np.ndarray, bins: MedianBins) -> Histogram:
    """Second pass over the same cells: the values in the bins of the medians."""
    code = _collect_codes(counts.data, counts.indices, counts.indptr, totals, bins.low, bins.high)
    code.sort()
    first = np.flatnonzero(np.diff(code, prepend=-1))
    return Histogram(code[first], np.diff(first, append=len(code)))


def merge_histograms(parts: Iterable[Histogram]) -> Histogram:
    """The histogram of all cells of `parts`, of either pass, whatever their order."""
    merged = Histogram(np.empty(0, np.int64), np.empty(0, np.int64))
    for part in parts:
        merged = Histogram(*_merge(merged.code, merged.count, part.code, part.count))
    return merged


def join_bins(parts: Iterable[MedianBins]) -> MedianBins:
    """The bins of all genes from those of ranges of genes."""
    lows, highs = zip(*((part.low, part.high) for part in parts), strict=True)
    return MedianBins(np.minimum.reduce(lows), np.minimum.reduce(highs))  # _NONE is the largest number


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

    @classmethod
    def join(cls, parts: Sequence[Beta]) -> Beta:
        """The medians of all genes from those of ranges of genes, each of them known to one part alone."""
        n_nonzero = np.sum([part.n_nonzero for part in parts], axis=0)
        beta = np.fmax.reduce([part.beta for part in parts])
        return replace(parts[0], n_nonzero=n_nonzero, beta=beta)

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


@nb.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _value(x, total):  # type: ignore[no-untyped-def]
    """The normalised value in float32, by the operations of `normalize`."""
    return np.float32(np.float64(x) / total * SCALE)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _count_bins(data, indices, indptr, totals, n_genes):  # type: ignore[no-untyped-def]
    """Occupied bins of each gene: a counting sort by gene, then a tally that stays in the cache."""
    start = np.zeros(n_genes + 1, np.int64)
    for i in range(len(data)):
        start[indices[i] + 1] += data[i] != 0
    for g in range(n_genes):
        start[g + 1] += start[g]
    by_gene = np.empty(start[n_genes], np.uint16)
    cursor = start[:-1].copy()
    image = np.empty(1, np.float32)
    bits = image.view(np.uint32)
    for cell in range(len(indptr) - 1):
        for i in range(indptr[cell], indptr[cell + 1]):
            if data[i] != 0:
                image[0] = _value(data[i], totals[cell])
                gene = indices[i]
                by_gene[cursor[gene]] = bits[0] >> np.uint32(16)
                cursor[gene] += 1

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


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _collect_codes(data, indices, indptr, totals, low, high):  # type: ignore[no-untyped-def]
    """gene << 32 | image of the values in the bins `low` and `high` of their gene, in CSR order."""
    code = np.empty(len(data) // 128 + 1024, np.int64)
    image = np.empty(1, np.float32)
    bits = image.view(np.uint32)
    n = 0
    for cell in range(len(indptr) - 1):
        for i in range(indptr[cell], indptr[cell + 1]):
            if data[i] == 0:
                continue
            image[0] = _value(data[i], totals[cell])
            gene = indices[i]
            top = bits[0] >> np.uint32(16)
            if top == low[gene] or top == high[gene]:
                if n == len(code):
                    wider = np.empty(2 * len(code), np.int64)
                    wider[:n] = code
                    code = wider
                code[n] = np.int64(gene) << 32 | np.int64(bits[0])
                n += 1
    return code[:n].copy()


@nb.njit(cache=True, nogil=True)
def _merge(code_a, count_a, code_b, count_b):  # type: ignore[no-untyped-def]
    """Two ascending lists of codes as one, the counts of equal codes added."""
    code = np.empty(len(code_a) + len(code_b), np.int64)
    count = np.empty(len(code), np.int64)
    i = j = n = 0
    while i < len(code_a) and j < len(code_b):
        a, b = code_a[i], code_b[j]
        code[n] = min(a, b)
        count[n] = (count_a[i] if a <= b else 0) + (count_b[j] if b <= a else 0)
        i += a <= b
        j += b <= a
        n += 1
    for k in range(i, len(code_a)):
        code[n], count[n] = code_a[k], count_a[k]
        n += 1
    for k in range(j, len(code_b)):
        code[n], count[n] = code_b[k], count_b[k]
        n += 1
    return code[:n].copy(), count[:n].copy()


def _total_by_gene(gene: np.ndarray, count: np.ndarray, n_genes: int) -> np.ndarray:
    """Sum of the counts of each gene (int64 [n_genes]); `gene` ascending."""
    ends = np.append(0, np.cumsum(count))
    return np.diff(ends[np.searchsorted(gene, np.arange(n_genes + 1))])  # gene is ascending


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
