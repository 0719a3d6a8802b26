"""How others make the same sentences and medians: what ours is measured against, and checked by.

Re-implementations of the loops in question from what is known of them (`value = x / n * 10,000 / median` in
float64, genes with a token and a median alone, `<cls>` first, falling value, cut at the context). They sort
by NumPy's default, which leaves the order of genes of equal value to chance: that is what is timed. With
`stable` such genes keep the order of var, and the sentences must be those of `langcell.cells.rank`, cell for
cell.
"""

from __future__ import annotations

from collections.abc import Iterator

import cellxgene_census
import numpy as np
import scipy.sparse as sp
import tiledbsoma as soma

from langcell.cells.normalize import SCALE, normalize
from langcell.census.layout import ORGANISM
from langcell.corpus.token_pass import Encoder

CHUNK = 512
"""Cells that Geneformer's tokenizer takes at a time."""


def dense_loop(
    counts: sp.csr_matrix, totals: np.ndarray, encoder: Encoder, stable: bool, chunk: int | None = None
) -> list[np.ndarray]:
    """LangCell's tokenizer: one dense matrix of all cells, normalised in float64, then row after row.

    chunk: cells that are made dense at a time. LangCell has no such thing; it saves memory and time.
    """
    known, median, token = _known(encoder)
    chunk = chunk or counts.shape[0]
    sentences = []
    for first in range(0, counts.shape[0], chunk):
        dense = counts[first : first + chunk][:, known].toarray()
        values = dense / totals[first : first + chunk, None] * SCALE / median
        for value in values:
            gene = np.nonzero(value)[0]
            sentences.append(_sentence(value[gene], token[gene], encoder, stable))
    return sentences


def sparse_loop(
    counts: sp.csr_matrix, totals: np.ndarray, encoder: Encoder, stable: bool
) -> list[np.ndarray]:
    """Geneformer's tokenizer: sparse chunks of 512 cells, whose rows are taken out one by one."""
    known, median, token = _known(encoder)
    sentences = []
    for first in range(0, counts.shape[0], CHUNK):
        chunk = counts[first : first + CHUNK][:, known]
        values = normalize(chunk, totals[first : first + CHUNK]) / median[chunk.indices]
        chunk = sp.csr_matrix((values, chunk.indices, chunk.indptr), chunk.shape)
        for cell in range(chunk.shape[0]):
            sentences.append(_sentence(chunk[cell].data, token[chunk[cell].indices], encoder, stable))
    return sentences


def blockwise_road(
    uri: str, cells: int, totals: np.ndarray, encoder: Encoder, stable: bool
) -> list[np.ndarray]:
    """From SOMA to tokens as the GeneformerTokenizer of cellxgene-census went before 1.18: X by blocks of
    scipy CSR, then row by row, each projected on the genes of the model by a sparse matrix and scaled.

    cells: the first so many; totals: float64 [cells]. What it does next, rows of a Hugging Face data set,
    is left out. Scaling in one multiplication ranks some cells otherwise: `stable` divides as we do.
    """
    known, median, token = _known(encoder)
    column = np.arange(len(known))
    project = sp.coo_matrix(
        (np.ones(len(known), bool), (known, column)), (len(encoder.beta_by_var), len(known))
    )
    sentences = []
    for first, block in _blocks(uri, cells):
        for cell in range(block.shape[0]):
            row, total = block[cell] @ project, totals[first + cell]
            if stable:
                row.sort_indices()
                value, gene = row.data.astype(np.float64) / total * SCALE / median[row.indices], row.indices
            else:
                scaled = row.multiply(SCALE / median / total)
                value, gene = scaled.data, scaled.col
            sentences.append(_sentence(value, token[gene], encoder, stable))
    return sentences


def numpy_medians(counts: sp.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Median of each gene's non-zero normalised counts (float32 [genes], NaN for none): all values held in
    the order of genes, and `numpy.median` gene by gene."""
    value = normalize(counts, totals).astype(np.float32)
    by_gene = sp.csr_matrix((value, counts.indices, counts.indptr), counts.shape).tocsc()
    medians = np.full(counts.shape[1], np.nan, np.float32)
    for gene in np.flatnonzero(np.diff(by_gene.indptr)):
        medians[gene] = np.median(by_gene.data[by_gene.indptr[gene] : by_gene.indptr[gene + 1]])
    return medians


def _blocks(uri: str, cells: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """First cell and counts of each band, with the settings that cellxgene-census opens a Census with."""
    with cellxgene_census.open_soma(uri=uri) as census:
        experiment = census["census_data"][ORGANISM]
        wanted = soma.AxisQuery(coords=(slice(0, cells - 1),))
        with experiment.axis_query("RNA", obs_query=wanted) as query:
            blocks = query.X("raw").blockwise(axis=0, size=2048, reindex_disable_on_axis=[1])
            for block, (joinid, _) in blocks.scipy(compress=True):
                yield int(joinid[0]), block


def _known(encoder: Encoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the genes that can stand in a sentence, their medians and tokens."""
    known = np.flatnonzero((encoder.token_by_var > 0) & (encoder.beta_by_var > 0))
    return known, encoder.beta_by_var[known], encoder.token_by_var[known]


def _sentence(value: np.ndarray, token: np.ndarray, encoder: Encoder, stable: bool) -> np.ndarray:
    order = np.argsort(-value, kind="stable" if stable else None)
    return np.concatenate([[encoder.cls], token[order]])[: encoder.max_length]
