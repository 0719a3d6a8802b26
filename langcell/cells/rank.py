"""Rank-value encoding: a cell's non-zero genes in order of falling count relative to beta.

The value of a gene is `(x / n * 10,000) / beta` in float64, in this order of operations: another order
or float32 changes the sentence of up to 1% of the cells (5 and 30 of 4,096 in the two variants that
others run). Genes of equal value keep the order of var. That rule is needed: with the medians of the
corpus itself nearly every cell has ties, and an unstable sort makes its sentence a matter of chance.

A sort by comparison of float64 pairs would be the whole cost of a cell, so it is a radix sort of 64-bit
words that carry all a gene needs: the float32 image of its value, its place in the row, its token. Images
are positive, so they compare as integers; of the distance to the cell's largest the leading 18 bits are
sorted in two stable passes of 9 (three digits of 11 bits, the textbook choice, spend more on clearing and
adding up counters than on a cell's 1,700 genes), and an insertion sort by the whole image, then by the
float64 value, mends what they leave. Rounding to float32 is monotone, so this is the stable float64 sort.
Counts below 256, nearly all, are normalised by a table: one division a gene instead of two. 70k cells/s
and core, at 1,650 genes a cell. Nothing dense, no Python per cell.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import scipy.sparse as sp

from langcell.cells.normalize import SCALE
from langcell.errors import InputError

DIGIT = 9
"""Bits of a digit of the radix sort."""
TABLE = 256
"""Counts that are normalised by a table."""
IMAGE, PLACE, FIELD = np.uint64(32), np.uint64(16), np.uint64(0xFFFF)
"""Of a word: image from bit 32 on, place in the row from bit 16, then the token."""


def rank_encode(
    counts: sp.csr_matrix,
    totals: np.ndarray,
    beta_by_var: np.ndarray,
    token_by_var: np.ndarray,
    cls: int,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of some cells, laid end to end: offsets (int64 [cells + 1]) and tokens (uint16).

    counts: CSR [cells, genes], raw counts; totals: float64 [cells], counts over all genes measured;
    beta_by_var: [genes], counts per ten thousand; token_by_var: uint16 [genes], 0 for a gene that is no
    token; cls: first token of every sentence; max_length: most tokens of one, `<cls>` included.
    A gene without token or without a finite, positive beta is left out; a cell of such genes is `<cls>`
    alone. Raises InputError for max_length below 2, and for more genes with a token than 16 bits count.
    """
    if max_length < 2:
        raise InputError(f"tokens.max_length is {max_length}; a sentence needs <cls> and a gene, 2 at least")
    if np.count_nonzero(token_by_var) > FIELD:
        raise InputError(f"{np.count_nonzero(token_by_var)} genes have a token; at most {FIELD} can")
    if not counts.has_sorted_indices:
        counts = counts.sorted_indices()
    beta = np.asarray(beta_by_var, np.float64)
    beta = np.where(np.isfinite(beta) & (beta > 0) & (token_by_var != 0), beta, np.nan)
    return _encode(
        counts.data,
        counts.indices,
        counts.indptr,
        np.ascontiguousarray(totals, np.float64),
        beta,
        np.ascontiguousarray(token_by_var, np.uint16),
        cls,
        max_length,
    )


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _encode(data, indices, indptr, totals, beta, token, cls, max_length):  # type: ignore[no-untyped-def]
    n_cells = len(indptr) - 1
    longest = 0
    room = 0
    for cell in range(n_cells):
        n = indptr[cell + 1] - indptr[cell]
        longest = max(longest, n)
        room += min(n + 1, max_length)
    offsets = np.zeros(n_cells + 1, np.int64)
    tokens = np.empty(room, np.uint16)

    value = np.empty(longest, np.float64)
    word, spare = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    image = np.empty(1, np.float32)
    bits = image.view(np.uint32)
    table = np.empty(TABLE, np.float64)
    low, high = np.empty(1 << DIGIT, np.int32), np.empty(1 << DIGIT, np.int32)
    end = 0
    for cell in range(n_cells):
        for x in range(TABLE):
            table[x] = np.float64(x) / totals[cell] * SCALE
        n = 0
        largest, smallest = np.uint64(0), np.uint64(0xFFFFFFFF)
        for entry in range(indptr[cell], indptr[cell + 1]):
            gene, x = indices[entry], data[entry]
            norm = table[np.int64(x)] if 0 <= x < TABLE else np.float64(x) / totals[cell] * SCALE
            v = norm / beta[gene]
            if v > 0:  # false for a stored zero and for a gene without beta
                value[n], image[0] = v, v
                key = np.uint64(bits[0])
                largest, smallest = max(largest, key), min(smallest, key)
                word[n] = key << IMAGE | np.uint64(n) << PLACE | np.uint64(token[gene])
                n += 1
        if n:
            _sort_falling(word, spare, value, n, largest, smallest, low, high)
        tokens[end] = cls
        end += 1
        for i in range(min(n, max_length - 1)):
            tokens[end] = np.uint16(word[i] & FIELD)
            end += 1
        offsets[cell + 1] = end
    return offsets, tokens[:end].copy()


@nb.njit(cache=True, nogil=True)
def _sort_falling(word, spare, value, n, largest, smallest, low, high):  # type: ignore[no-untyped-def]
    """Sorts `word[:n]` by falling `value` (of the place that a word names), stable. The images lie between
    `smallest` and `largest`; `spare`, `low` and `high` are scratch."""
    drop = np.uint64(0)
    while (largest - smallest) >> drop >> np.uint64(2 * DIGIT):
        drop += np.uint64(1)
    digit, mask = np.uint64(DIGIT), np.uint64((1 << DIGIT) - 1)
    low[:] = 0
    high[:] = 0
    for i in range(n):
        distance = (largest - (word[i] >> IMAGE)) >> drop
        low[distance & mask] += 1
        high[distance >> digit] += 1
    before_low = before_high = 0
    for d in range(1 << DIGIT):
        before_low, low[d] = before_low + low[d], before_low
        before_high, high[d] = before_high + high[d], before_high
    for i in range(n):
        d = ((largest - (word[i] >> IMAGE)) >> drop) & mask
        spare[low[d]] = word[i]
        low[d] += 1
    for i in range(n):
        d = ((largest - (spare[i] >> IMAGE)) >> drop) >> digit
        word[high[d]] = spare[i]
        high[d] += 1
    for i in range(1, n):  # what the dropped bits, and equal images, leave
        mover = word[i]
        key = mover >> IMAGE
        if word[i - 1] >> IMAGE > key:
            continue
        v = value[mover >> PLACE & FIELD]
        j = i
        while j:
            other = word[j - 1] >> IMAGE
            if other > key or (other == key and value[word[j - 1] >> PLACE & FIELD] >= v):
                break
            word[j] = word[j - 1]
            j -= 1
        word[j] = mover
