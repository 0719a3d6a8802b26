"""Raw counts of an AnnData as sentences of a trained model.

A sentence depends on the vocabulary and on the medians of the corpus that the model was trained on: both come
from the model, and nothing is computed from the cohort (its own medians would give other tokens to the same
cell). Genes of equal rank keep the order of the corpus's var, which is that of `Beta.feature_id`, whatever
the order of the file's columns.

A matrix is read `ROWS` cells at a time, in memory and from a backed file alike, so that memory follows the
piece and not the file: of 60,000 genes a dense piece takes 123 MB. Every piece is checked as it is
read, the first one before any model runs. A cell without a gene of the vocabulary (an empty droplet) is no
error: its sentence is `<cls>` alone, and `empty_N` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset

from langcell.batch import Packed
from langcell.cells.beta import Beta
from langcell.cells.faults import REASONS, Fault, find_faults
from langcell.cells.rank import rank_encode
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError
from langcell.inference.genes import FileGenes, find_genes, refuse_other_organism

ROWS = 512
"""Cells of a piece."""
_LOG = 20.0
"""No log-normalised value is as large: ln(1 + 1e6) is 13.8."""
_VALUE_FAULTS = (Fault.NOT_FINITE, Fault.NEGATIVE, Fault.NOT_INTEGER)


class Counts:
    """Cells of an AnnData, ready to be read as sentences.

    n: cells; genes: genes of the vocabulary that the file has; naming: where their names were found, in
    words ("symbols of var['feature_name']"); empty_N: bool [n], the cells read so far that have no gene of
    the vocabulary.
    """

    def __init__(
        self,
        adata: AnnData,
        layer: str | None,
        found: FileGenes,
        vocabulary: Vocabulary,
        beta: Beta,
        max_length: int,
    ) -> None:
        self._adata, self._layer = adata, layer
        self._matrix = _matrix(adata, layer)
        self._raw_sum = _raw_sum(adata)
        rows, gene_of = np.unique(found.gene[found.gene >= 0], return_inverse=True)  # in the order of beta
        columns = np.flatnonzero(found.gene >= 0)
        shape = (len(found.gene), len(rows))
        # Counts times this: the model's genes in their order, columns of one gene summed.
        self._choice = sp.csr_matrix((np.ones(len(columns), np.float32), (columns, gene_of)), shape)
        self._beta = beta.beta[rows]
        self._token = vocabulary.tokens_of(beta.feature_id[row] for row in rows)
        self._cls, self._max_length = vocabulary.cls, max_length
        self.n, self.genes, self.naming = adata.n_obs, len(rows), found.naming
        self.empty_N = np.zeros(self.n, bool)

    @classmethod
    def of(
        cls,
        adata: AnnData,
        vocabulary: Vocabulary,
        beta: Beta,
        *,
        organism: str,
        max_length: int,
        layer: str | None = None,
        symbols: Mapping[str, str] | None = None,
    ) -> Counts:
        """Finds the counts and the genes, and looks at the first cells.

        adata: in memory or backed; a backed view is loaded. vocabulary, beta, organism, max_length (tokens,
        `<cls>` included): the model's. layer: where the raw counts are: None for X, `raw` for adata.raw (or,
        where there is none, a layer of that name), or the name of a layer. symbols: Ensembl id by symbol,
        where the model does not know them. A cell's total is obs `raw_sum` where that is stated (X may hold
        a part of the genes), else the sum over all columns, those that are no token included.

        Warns of genes that stand twice, and of few of the model's. Raises InputError: no cells, no such
        layer, a backed matrix stored by columns, genes or cells of another organism, no gene of the
        vocabulary, counts that are not raw.
        """
        if not adata.n_obs:
            raise InputError("adata holds no cells (0 rows): nothing to read")
        var = adata.raw.var if layer == "raw" and adata.raw is not None else adata.var
        refuse_other_organism(var, adata.obs, adata.uns, organism)
        found = find_genes(var, vocabulary, beta, symbols)
        counts = cls(adata, layer, found, vocabulary, beta, max_length)
        counts._read(0, ROWS)
        return counts

    def chunks(self, cells: int = 4096) -> Iterator[tuple[int, Packed]]:
        """All cells in their order, so many at a time: the first one's row, and their sentences."""
        for start in range(0, self.n, cells):
            yield start, self.sentences(start, start + cells)

    def sentences(self, start: int, stop: int) -> Packed:
        """Token sentences of the rows [start, stop), as far as there are. Raises InputError, naming the cell,
        for what is no raw count."""
        lengths, tokens = [np.empty(0, np.int64)], [np.empty(0, np.uint16)]
        for first in range(start, min(stop, self.n), ROWS):
            counts, totals = self._read(first, min(first + ROWS, stop))
            # By columns and back is a counting sort: half the time of `sort_indices`.
            chosen = (counts @ self._choice).tocsc().tocsr()
            offsets, piece = rank_encode(chosen, totals, self._beta, self._token, self._cls, self._max_length)
            self.empty_N[first : first + len(totals)] = np.diff(offsets) == 1
            lengths.append(np.diff(offsets))
            tokens.append(piece)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        return Packed.from_offsets(np.concatenate(tokens), offsets)

    def _read(self, start: int, stop: int) -> tuple[sp.csr_matrix, np.ndarray]:
        """Checked counts of some cells over the file's columns, and their totals (float64)."""
        counts = _rows(self._matrix, start, stop)
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        if self._raw_sum is not None:
            stated = self._raw_sum[start:stop]
            totals = np.where(np.isnan(stated), totals, stated)
        fault = find_faults(counts, totals)
        bad = np.flatnonzero((fault != Fault.NONE) & (fault != Fault.EMPTY))
        if len(bad):
            self._refuse(counts, fault, int(bad[0]), start)
        return counts, totals

    def _refuse(self, counts: sp.csr_matrix, fault: np.ndarray, cell: int, start: int) -> None:
        where = _place(self._layer)
        wrong = np.isin(fault, _VALUE_FAULTS)
        if 2 * wrong.sum() > np.count_nonzero(fault != Fault.EMPTY):  # the matrix, not a cell
            values = counts.data
            if np.isfinite(values).all():
                kind = "log-normalised" if values.max() < _LOG else "normalised"
                kind = "scaled" if values.min() < 0 else kind
            else:
                kind = "NaN or infinite"
            no_count = values[(values != np.rint(values)) | (values < 0) | ~np.isfinite(values)]
            problem = f"{where} holds {kind} values ({no_count[0]:.4g}, ...), but raw counts are needed"
        else:
            name = self._adata.obs_names[start + cell]
            problem = f"cell {name} of {where}: {REASONS[Fault(fault[cell])]}"
        if fault[cell] == Fault.TOTAL:
            raise InputError(f"{problem}. Mend obs['raw_sum'] or take it out")
        raise InputError(f"{problem}. {_remedy(self._adata, self._layer)}")


_BY_ROWS = (sp.csr_matrix, sp.csr_array, np.ndarray, h5py.Dataset, CSRDataset)
"""What rows are read from."""


def _matrix(adata: AnnData, layer: str | None) -> Any:
    """The matrix of counts by rows; one stored by columns in memory is converted, the AnnData stays."""
    place = _place(layer)
    if layer is None:
        matrix = adata.X
    elif layer == "raw" and adata.raw is not None:
        matrix = adata.raw.X
    elif layer in adata.layers:
        matrix = adata.layers[layer]
    else:
        raise InputError(
            f"adata has no {place}. It has: {', '.join(map(_place, _layers(adata)))}; "
            "name the one that holds raw counts with layer"
        )
    if matrix is None:
        raise InputError(f"adata has no {place}. {_remedy(adata, layer)}")
    if isinstance(matrix, CSCDataset):
        raise InputError(
            f"{place} is stored by columns (CSC) in a backed file, which would have to be read whole for "
            "every cell. Read it into memory (anndata.read_h5ad(path)), or store it by rows: "
            "a.X = a.X.tocsr(); a.write_h5ad(path)"
        )
    if sp.issparse(matrix):
        matrix = matrix.tocsr()
    if not isinstance(matrix, _BY_ROWS) or matrix.dtype.kind not in "biuf":
        raise InputError(
            f"{place} is a {type(matrix).__name__}; a sparse or dense matrix of numbers is expected, in "
            "memory (adata.to_memory()) or backed"
        )
    return matrix


def _rows(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    """A copy of some rows, float32, columns ascending, an entry each.

    float32 as in a corpus: what is off a whole number by less than its rounding is one, too, as counts
    that were recovered by a division are.
    """
    rows = matrix[start:stop]
    if not sp.issparse(rows):
        rows = np.asarray(rows, np.float32)
    with np.errstate(over="ignore"):  # infinite then, and refused
        counts = sp.csr_matrix(rows, dtype=np.float32, copy=True)
    counts.indices, counts.indptr = counts.indices.astype(np.int32), counts.indptr.astype(np.int32)
    counts.sum_duplicates()
    return counts


def _raw_sum(adata: AnnData) -> np.ndarray | None:
    """Counts of each cell over all genes measured as obs states them (float64), NaN where it does not."""
    if "raw_sum" not in adata.obs:
        return None
    try:
        return adata.obs["raw_sum"].to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"obs['raw_sum'] holds no numbers ({error}): total counts of the cells are expected. Mend it or "
            "take it out"
        ) from error


def _layers(adata: AnnData) -> list[str | None]:
    """Every `layer` that could be asked for."""
    raw = ["raw"] if adata.raw is not None else []
    return list(dict.fromkeys([*([None] if adata.X is not None else []), *raw, *adata.layers]))


def _place(layer: str | None) -> str:
    return {None: "X", "raw": "raw"}.get(layer, f"layers[{layer!r}]")


def _remedy(adata: AnnData, layer: str | None) -> str:
    """Where whole numbers are found instead, by the first cells."""
    for other in _layers(adata):
        if other != layer and _is_raw(adata, other):
            return f"{_place(other)} holds whole numbers: give layer={other!r}"
    return "No other matrix there holds whole numbers: give the cells as they were before normalisation"


def _is_raw(adata: AnnData, layer: str | None) -> bool:
    try:
        counts = _rows(_matrix(adata, layer), 0, ROWS)
    except InputError:
        return False
    fault = find_faults(counts, np.full(counts.shape[0], np.inf))
    return bool(counts.nnz) and not np.isin(fault, _VALUE_FAULTS).any()
