"""A model whose every output can be worked out by hand, and an ontology of a few lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langcell.batch import Packed


class ToyModel(nn.Module):
    """The methods that inference calls, from random tables; matching depends on every state of a cell.

    `matched` logs the size of each matching forward: (pairs, text tokens, cell tokens).
    """

    def __init__(self, vocabulary: int = 50, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, width, generator=generator))
        self.mixer = nn.Parameter(torch.randn(width, width, generator=generator) / width)
        self.locked = nn.Dropout(0.5).eval()
        self.matched: list[tuple[int, int, int]] = []

    def cell_states(self, cells: Packed) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return self.table[cells.tokens_T] + 0.01 * cells.position_T[:, None]

    def _mean(self, states_TD: Tensor, sequences: Packed) -> Tensor:
        sums = torch.zeros(len(sequences), states_TD.shape[1]).index_add(0, sequences.sequence_T, states_TD)
        return sums / sequences.lengths_B[:, None]

    def project_cells(self, states_TD: Tensor, cells: Packed) -> Tensor:
        return F.normalize(self._mean(states_TD, cells), dim=-1)

    def project_texts(self, texts: Packed) -> Tensor:
        return F.normalize(self._mean(self.table[texts.tokens_T], texts) @ self.mixer, dim=-1)

    def match(self, states_TD: Tensor, cells: Packed, texts: Packed, cell_of_pair_P: Tensor) -> Tensor:
        assert len(texts) == len(cell_of_pair_P)
        assert (cell_of_pair_P.diff() >= 0).all()
        self.matched.append((len(texts), texts.tokens_T.numel(), cells.tokens_T.numel()))
        cell_PD = self._mean(states_TD.sin(), cells)[cell_of_pair_P]
        text_PD = self._mean(self.table[texts.tokens_T], texts)
        score_P = 3 * ((cell_PD @ self.mixer) * text_PD).sum(1)
        return torch.stack([-score_P, score_P], dim=1)


@dataclass(frozen=True)
class ToyTerm:
    id: str
    label: str
    definition: str | None = None
    synonyms: tuple[str, ...] = ()
    ancestors: frozenset[str] = frozenset()


@dataclass
class ToyOntology:
    """An ontology from the parents of each term."""

    parents: dict[str, list[str]]
    labels: dict[str, str] = field(default_factory=dict)

    def get(self, term: str) -> ToyTerm | None:
        if term not in self.parents:
            return None
        label = self.labels.get(term, term.lower())
        return ToyTerm(term, label, f"A {label}.", (), self.ancestors(term))

    def find(self, name: str, within: list[str] | None = None) -> ToyTerm | None:
        return next((term for term in map(self.get, self.parents) if name in (term.id, term.label)), None)

    def ancestors(self, term: str) -> frozenset[str]:
        found: set[str] = set()
        for parent in self.parents.get(term, []):
            found |= {parent, *self.ancestors(parent)}
        return frozenset(found)

    def related(self, a: str, b: str) -> bool:
        return a in self.ancestors(b) or b in self.ancestors(a)

    def depth(self, term: str) -> int:
        return max((1 + self.depth(parent) for parent in self.parents.get(term, [])), default=0)


class ToyTokenizer:
    """One token a character."""

    def __call__(self, texts: list[str], truncation: bool, max_length: int, **_: object) -> dict:
        assert truncation
        return {"input_ids": [[ord(c) % 50 for c in text][:max_length] for text in texts]}


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    return SimpleNamespace(Model=ToyModel, Ontology=ToyOntology, Tokenizer=ToyTokenizer)
