"""The median of each gene's non-zero normalised counts over a corpus, exact, in two passes that merge.

Sketches are off by up to 2% (t-digest; KLL far more on rare genes) and depend on the order of merging,
so two runs over the same cells rank genes differently. A median needs no sketch: it is a selection by
rank, done here on the float32 image of the values in two passes, as a radix selection does.

1. `histogram`: count the values of each gene by the top 16 bits of their image (sign, exponent, 7 bits
   of mantissa: bins 0.8% wide). The bin of the middle rank follows (`median_bins`).
2. `collect`: count the values in that bin, or in the two bins that the two middle ranks of an even
   number fall in, by their other 16 bits: 0.33% of the values. The value at the middle rank is the median
   (`finish`): bit for bit `numpy.median` of the gene's float32 values.

Partial results are sparse integer counts in both passes and merge by addition: any slicing, any order
and any tree of merging give the same bits, and a partial is returned, not added to shared state, so
that a task may run again. Images are positive, so they sort as integers.

Cost: 8 bytes a bin, since a partial is cut into ranges of genes (`gene_ranges`) that are reduced apart and
numbers its genes from the range's first. The bins that some cell occupies grow slowly with the cells
(generated Census, 60,000 genes): 29 MB at 4,000 cells, 160 MB at 100,000, about 350 MB at 27.5M by the law
that fits these. Any number of partials merge in one sweep, gene by gene over a tally that stays in the
cache. The second pass is smaller: 0.33% of the values, and equal ones (few counts over few totals) share
an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numba as nb
import numpy as np
import scipy.sparse as sp

from langcell.cells.normalize import SCALE

MOST_GENES = 1 << 15
"""Genes of a range: 15 bits of a code, beside 17 of a value."""
_TOP, _UPPER = 16, 17  # bits of a code below its gene, in the first pass and in the second
_NONE = np.uint16(0xFFFF)  # a bin that no positive number falls in


@dataclass(frozen=True)
class Histogram:
    """How many values of a range of `n_genes` genes fall in each bin that holds one.

    code: uint32, ascending. First pass: gene << 16 | top 16 bits of the value's float32 image; second:
    gene << 17 | (1 in the upper of two middle bins) << 16 | the other 16 bits. Genes count from the
    range's first. count: uint32, positive.
    """

    n_genes: int
    code: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class MedianBins:
    """The bins (top 16 bits, uint16 [genes]) of each gene's lower and upper middle value; they differ at
    most where the number of values is even. 0xFFFF, which no value has, for a gene without values."""

    low: np.ndarray
    high: np.ndarray


def gene_ranges(n_genes: int, at_least: int) -> np.ndarray:
    """Where the ranges begin that the genes are reduced in, and the last one's end (int64 [ranges + 1])."""
    return np.linspace(0, n_genes, max(at_least, -(-n_genes // MOST_GENES)) + 1).astype(np.int64)


def histogram(counts: sp.csr_matrix, totals: np.ndarray, ranges: np.ndarray) -> list[Histogram]:
    """First pass over some cells: counts CSR [cells, genes], totals float64 [cells]. One part a range."""
    code, count, ends = _count_bins(counts.data, counts.indices, counts.indptr, totals, ranges)
    return _parts(ranges, code, count, ends)


def collect(
    counts: sp.csr_matrix, totals: np.ndarray, bins: MedianBins, ranges: np.ndarray
) -> list[Histogram]:
    """Second pass over the same cells: the values in the bins of the medians of all genes."""
    code = _collect_codes(counts.data, counts.indices, counts.indptr, totals, bins.low, bins.high)
    code, count = np.unique(code, return_counts=True)
    ends = np.searchsorted(code, ranges << _UPPER)
    first_gene = np.repeat(ranges[:-1], np.diff(ends))
    return _parts(ranges, (code - (first_gene << _UPPER)).astype(np.uint32), count.astype(np.uint32), ends)


def merge_histograms(parts: Sequence[Histogram]) -> Histogram:
    """The histogram of all cells of `parts`, of the first pass over a range, whatever their order."""
    codes, counts = nb.typed.List(), nb.typed.List()
    for part in parts:
        for arrays, array in ((codes, part.code), (counts, part.count)):
            view = array.view()
            view.flags.writeable = False  # as what comes from the object store: one type, compiled once
            arrays.append(view)
    return Histogram(parts[0].n_genes, *_add_up(parts[0].n_genes, codes, counts))


def merge_collected(parts: Sequence[Histogram]) -> Histogram:
    """The same for the second pass."""
    code, entry = np.unique(np.concatenate([part.code for part in parts]), return_inverse=True)
    count = np.zeros(len(code), np.uint32)
    np.add.at(count, entry, np.concatenate([part.count for part in parts]))
    return Histogram(parts[0].n_genes, code, count)


def median_bins(hist: Histogram) -> MedianBins:
    """Where each gene's middle values lie, from the merged histogram of the first pass."""
    n, low, high, _ = _middle(hist)
    top = np.append(hist.code & 0xFFFF, _NONE).astype(np.uint16)
    low[n == 0] = high[n == 0] = len(hist.code)
    return MedianBins(top[low], top[high])


def join_bins(parts: Sequence[MedianBins]) -> MedianBins:
    """The bins of all genes from those of the ranges, in order."""
    return MedianBins(np.concatenate([part.low for part in parts]), np.concatenate([p.high for p in parts]))


def finish(hist: Histogram, bins: MedianBins, collected: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """From the merged results of both passes over a range: number of values (int64 [genes]) and median
    (float32 [genes], NaN where there is no value).

    Raises RuntimeError if the second pass saw other values than the first.
    """
    n, _, _, before = _middle(hist)
    here, top = hist.code >> _TOP, hist.code & 0xFFFF
    is_middle = (top == bins.low[here]) | (top == bins.high[here])
    expected = _total_by_gene(here[is_middle], hist.count[is_middle], hist.n_genes)
    gene = collected.code >> _UPPER
    if not np.array_equal(_total_by_gene(gene, collected.count, hist.n_genes), expected):
        raise RuntimeError("the two passes over the counts did not see the same cells")

    median = np.full(hist.n_genes, np.nan, np.float32)
    known = np.flatnonzero(n)
    if len(known):
        # Ranks among the collected values of all genes, which are sorted by gene, then value.
        start = (np.cumsum(expected) - expected)[known] - before[known]
        ends = np.cumsum(collected.count, dtype=np.int64)
        middle = [start + (n[known] - 1) // 2, start + n[known] // 2]
        in_upper = (collected.code >> _TOP & 1).astype(bool)
        its_bin = np.where(in_upper, bins.high[gene], bins.low[gene]).astype(np.uint32)
        value = (its_bin << 16 | collected.code & 0xFFFF).view(np.float32)
        lower, upper = (value[np.searchsorted(ends, rank, side="right")] for rank in middle)
        median[known] = (lower + upper) / np.float32(2)
    return n, median


def _parts(ranges: np.ndarray, code: np.ndarray, count: np.ndarray, ends: np.ndarray) -> list[Histogram]:
    """What was counted of all ranges, one by one; copies, so that each is stored alone."""
    genes = np.diff(ranges).tolist()
    return [
        Histogram(n, code[a:b].copy(), count[a:b].copy())
        for n, (a, b) in zip(genes, pairwise(ends), strict=True)
    ]


@nb.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _value(x, total):  # type: ignore[no-untyped-def]
    """The normalised value in float32, by the operations of `normalize`."""
    return np.float32(np.float64(x) / total * SCALE)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _count_bins(data, indices, indptr, totals, ranges):  # type: ignore[no-untyped-def]
    """Occupied bins of each gene: a counting sort by gene, then a tally that stays in the cache. Codes and
    counts of all ranges, and where each ends."""
    n_genes = ranges[-1]
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

    tally = np.zeros(1 << 16, np.uint32)
    code, count = np.empty(1 << 16, np.uint32), np.empty(1 << 16, np.uint32)
    ends = np.zeros(len(ranges), np.int64)
    n = 0
    for r in range(len(ranges) - 1):
        for g in range(ranges[r], ranges[r + 1]):
            if start[g] == start[g + 1]:
                continue
            first, last = 1 << 16, 0
            for i in range(start[g], start[g + 1]):
                tally[by_gene[i]] += np.uint32(1)
                first, last = min(first, by_gene[i]), max(last, by_gene[i])
            if n + last + 1 - first > len(code):
                room = 2 * len(code) + (1 << 16)
                wider_code, wider_count = np.empty(room, np.uint32), np.empty(room, np.uint32)
                wider_code[:n], wider_count[:n] = code[:n], count[:n]
                code, count = wider_code, wider_count
            n = _empty_tally(tally, first, last, g - ranges[r], code, count, n)
        ends[r + 1] = n
    return code, count, ends


@nb.njit(cache=True, nogil=True, inline="always")
def _empty_tally(tally, first, last, gene, code, count, n):  # type: ignore[no-untyped-def]
    """Moves a gene's occupied bins from `first` to `last` into the lists, from `n` on; where they end.

    Without a branch: an empty bin is overwritten by the next, which needs room for all from first to last.
    """
    for b in range(first, last + 1):
        code[n], count[n] = (gene << 16) | b, tally[b]
        n += tally[b] != 0
        tally[b] = 0
    return n


@nb.njit(cache=True, nogil=True)
def _add_up(n_genes, codes, counts):  # type: ignore[no-untyped-def]
    """Ascending lists of codes as one, the counts of equal codes added, by a tally of one gene at a time."""
    room = 1 << 16  # beyond the last code, for bins that turn out empty
    for part in codes:
        room += len(part)
    code, count = np.empty(room, np.uint32), np.empty(room, np.uint32)
    tally, at = np.zeros(1 << 16, np.uint32), np.zeros(len(codes), np.int64)
    n = 0
    for g in range(n_genes):
        first, last = np.int64(1 << 16), np.int64(-1)
        for k in range(len(codes)):
            i, own_code, own_count = at[k], codes[k], counts[k]
            if i == len(own_code) or own_code[i] >> 16 != g:
                continue
            first = min(first, np.int64(own_code[i] & 0xFFFF))
            while i < len(own_code) and own_code[i] >> 16 == g:
                tally[own_code[i] & 0xFFFF] += own_count[i]
                i += 1
            last = max(last, np.int64(own_code[i - 1] & 0xFFFF))
            at[k] = i
        n = _empty_tally(tally, first, last, g, code, count, n)
    return code[:n].copy(), count[:n].copy()


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _collect_codes(data, indices, indptr, totals, low, high):  # type: ignore[no-untyped-def]
    """Codes (int64, genes from the first of all) of the values in the bins `low` and `high` of their gene,
    in CSR order."""
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
                upper = np.int64(top != low[gene])
                code[n] = np.int64(gene) << _UPPER | upper << _TOP | np.int64(bits[0] & np.uint32(0xFFFF))
                n += 1
    return code[:n].copy()


def _total_by_gene(gene: np.ndarray, count: np.ndarray, n_genes: int) -> np.ndarray:
    """Sum of the counts of each gene (int64 [n_genes]); `gene` ascending."""
    ends = np.append(0, np.cumsum(count, dtype=np.int64))
    return np.diff(ends[np.searchsorted(gene, np.arange(n_genes + 1))])


def _middle(hist: Histogram) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per gene: number of values, entries of the lower and of the upper middle value, and the number
    of values below the former's bin (int64 [genes]; meaningless for a gene without values)."""
    ends = np.cumsum(hist.count, dtype=np.int64)
    before_entry = ends - hist.count
    n = _total_by_gene(hist.code >> _TOP, hist.count, hist.n_genes)
    before_gene = np.cumsum(n) - n
    low = np.searchsorted(ends, before_gene + (n - 1) // 2, side="right")
    high = np.searchsorted(ends, before_gene + n // 2, side="right")
    before = np.append(before_entry, 0)[np.minimum(low, len(ends))] - before_gene
    return n, low, high, before
