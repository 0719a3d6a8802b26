"""MicroBatch: where corpus and model meet.

Nothing here is padded. Census cells average far below the 2,048-token context and texts far below
512, so a batch is one long row of tokens with the offsets of its sequences (`cu_seqlens`, as
variable-length flash attention takes them). A text never travels with a cell: a cell carries the
row of its text in a `TextTable` that every rank holds, so that any rank can evaluate any
(cell, text) pair of the global batch from ids alone.

Shape suffixes: B cells or sequences, T their tokens, K distinct texts, N rows of the text table,
C cell-type terms of the corpus, V variants of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end.

    tokens_T: int64; cu_seqlens_B1: int32, offsets of the sequences, first 0 and last T;
    max_seqlen: the longest sequence (tokens).
    """

    tokens_T: Tensor
    cu_seqlens_B1: Tensor
    max_seqlen: int

    @classmethod
    def from_offsets(cls, tokens: np.ndarray, offsets: np.ndarray) -> Packed:
        """From one flat array of tokens and its B + 1 offsets (any integer types). Raises OverflowError for
        more tokens than an int32 counts."""
        if offsets[-1] > np.iinfo(np.int32).max:
            raise OverflowError(f"{offsets[-1]:,} tokens are too many for one batch")
        lengths_B = np.diff(offsets)
        return cls(
            # Copies: a view of Arrow's memory is read-only, which PyTorch cannot promise to keep.
            torch.from_numpy(np.array(tokens, dtype=np.int64)),
            torch.from_numpy(np.array(offsets, dtype=np.int32)),
            int(lengths_B.max(initial=0)),
        )

    @classmethod
    def from_sequences(cls, sequences: Sequence[np.ndarray | Sequence[int]]) -> Packed:
        """From B sequences of token ids."""
        arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
        return cls.from_offsets(np.concatenate(arrays or [np.empty(0, np.int64)]), offsets)

    def __len__(self) -> int:
        return self.cu_seqlens_B1.numel() - 1

    @property
    def lengths_B(self) -> Tensor:
        return self.cu_seqlens_B1.diff()

    @property
    def starts_B(self) -> Tensor:
        """Index of each sequence's first token (int64)."""
        return self.cu_seqlens_B1[:-1].long()

    @property
    def position_T(self) -> Tensor:
        """Position of each token in its own sequence (int64)."""
        return torch.arange(self.tokens_T.numel(), device=self.tokens_T.device) - torch.repeat_interleave(
            self.starts_B, self.lengths_B.long(), output_size=self.tokens_T.numel()
        )

    @property
    def sequence_T(self) -> Tensor:
        """Index of the sequence that each token belongs to (int64)."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.tokens_T.device),
            self.lengths_B.long(),
            output_size=self.tokens_T.numel(),
        )

    def with_tokens(self, tokens_T: Tensor) -> Packed:
        """The same sequences with other tokens."""
        return Packed(tokens_T, self.cu_seqlens_B1, self.max_seqlen)

    def select(self, rows_K: Tensor) -> Packed:
        """Sequences `rows_K` (int64, repeats allowed), packed in that order."""
        return self.select_with(rows_K, self.tokens_T)[0]

    def select_with(self, rows_K: Tensor, states_T: Tensor) -> tuple[Packed, Tensor]:
        """`select`, and the same tokens' rows of `states_T` [T, ...]."""
        lengths_K = self.lengths_B.long()[rows_K]
        cu_K1 = torch.zeros(rows_K.numel() + 1, dtype=torch.int64, device=rows_K.device)
        cu_K1[1:] = lengths_K.cumsum(0)
        total = int(cu_K1[-1])
        shift_K = self.starts_B[rows_K] - cu_K1[:-1]
        index_T = torch.arange(total, device=rows_K.device) + torch.repeat_interleave(
            shift_K, lengths_K, output_size=total
        )
        longest = int(lengths_K.max()) if rows_K.numel() else 0
        return Packed(self.tokens_T[index_T], cu_K1.int(), longest), states_T[index_T]

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        return Packed(self.tokens_T.to(device), self.cu_seqlens_B1.to(device), self.max_seqlen)


@dataclass(frozen=True)
class TextTable:
    """All texts of a corpus, tokenised once, with their variants.

    Each text has V variants: the full one, then the shortened ones (facets other than the cell type
    dropped; the last is the cell type alone). Many texts share a shortened variant: the same words are
    one row.
    packed: N rows, in distinct words; text_id: int64 [K], sorted; row_KV: int64, the row of each variant of
    each text; term: int64 [K], index of each text's cell-type term in the corpus's sorted terms, then one
    index for each cell type that the ontology has no term for; related_CC: bool, true where one term is
    an ontology ancestor of the other (never on the diagonal).
    """

    packed: Packed
    text_id: np.ndarray
    row_KV: np.ndarray
    term: np.ndarray
    related_CC: Tensor

    @property
    def variants(self) -> int:
        """V."""
        return self.row_KV.shape[1]

    def index(self, text_id_B: np.ndarray) -> np.ndarray:
        """Index of each text id among the distinct texts (int64).

        Raises KeyError naming an id that the table does not hold.
        """
        index_B = np.searchsorted(self.text_id, text_id_B).clip(max=len(self.text_id) - 1)
        missing = self.text_id[index_B] != text_id_B
        if missing.any():
            raise KeyError(f"text_id {text_id_B[missing][0]} is not in the corpus's text table")
        return index_B

    def to(self, device: torch.device | str) -> TextTable:
        """The same with its tensors on `device`."""
        return TextTable(
            self.packed.to(device),
            self.text_id,
            self.row_KV,
            self.term,
            self.related_CC.to(device),
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one lane hands to the engine in one step.

    cells: B packed sentences of genes; soma_joinid_B, text_id_B: int64; term_B: int64, index of the
    cell-type term in the corpus's terms (`TextTable.term`); text_row_B: int64, row of the drawn variant
    of the cell's text in the text table; short_B: bool, whether that variant is a
    shortened one, or says no more than the shortest.
    """

    cells: Packed
    soma_joinid_B: Tensor
    text_id_B: Tensor
    term_B: Tensor
    text_row_B: Tensor
    short_B: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    @cached_property
    def distinct_texts(self) -> tuple[Tensor, Tensor]:
        """Rows of the texts drawn, each once and ascending (int64 [K]), and which of them each cell has
        (int64 [B]). Found once: on a GPU the host waits for it."""
        row_K, index_B = self.text_row_B.unique(return_inverse=True)
        return row_K, index_B

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on `device`."""
        return MicroBatch(
            self.cells.to(device),
            self.soma_joinid_B.to(device),
            self.text_id_B.to(device),
            self.term_B.to(device),
            self.text_row_B.to(device),
            self.short_B.to(device),
        )
