"""Which gene is which token.

Geneformer's layout, extended as LangCell does: `<pad>` 0, `<mask>` 1, genes from 2 on, `<cls>` after
the last gene (25,426 for Geneformer's 25,424). `<cls>` comes last, so that the rows of a Geneformer
checkpoint keep their places. Ids are stored as uint16; 0 doubles as "not in the vocabulary", which a
sentence never holds.

Geneformer V2 puts `<cls>` and `<eos>` before its genes. They are the same genes in the same order under other
numbers, so its dictionary gives a vocabulary like any other, and `model.interop` puts the rows of its
checkpoints in this order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
from pyarrow import fs

from langcell.cells.beta import Beta
from langcell.cells.pickles import is_pickle, read_pickle_dict
from langcell.errors import InputError

PAD = 0
MASK = 1
FIRST_GENE = 2
GENEFORMER = {"V1": ("<pad>", "<mask>"), "V2": ("<pad>", "<mask>", "<cls>", "<eos>")}
"""What Geneformer's token dictionaries hold before the genes."""


@dataclass(frozen=True)
class Vocabulary:
    """Gene i of `gene_ids` is token 2 + i.

    renumbered: whether the dictionary that it was read from has other numbers (Geneformer V2), so that
    sentences which others made with it are none of this vocabulary.

    Raises InputError for a gene that stands twice, and for more tokens than uint16 can count.
    """

    gene_ids: list[str]
    renumbered: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for gene, times in Counter(self.gene_ids).most_common(1):
            if times > 1:
                raise InputError(f"vocabulary: gene {gene} stands {times} times")
        if self.cls > np.iinfo(np.uint16).max:
            raise InputError(
                f"vocabulary: {len(self.gene_ids)} genes and 3 special tokens do not fit 16 bits; "
                "at most 65,533 genes can be tokens. Give a smaller one with tokens.vocabulary"
            )

    @property
    def cls(self) -> int:
        """Token that begins every sentence."""
        return FIRST_GENE + len(self.gene_ids)

    @property
    def size(self) -> int:
        """Number of tokens, `<pad>`, `<mask>` and `<cls>` included."""
        return len(self.gene_ids) + 3

    @property
    def hash(self) -> str:
        """Hex digest of the genes in their order."""
        return blake2b("\n".join(self.gene_ids).encode(), digest_size=16).hexdigest()

    def tokens_of(self, feature_ids: Iterable[str]) -> np.ndarray:
        """Token of each gene, 0 for one that the vocabulary does not hold (uint16)."""
        return np.array([self._token_of.get(gene, PAD) for gene in feature_ids], np.uint16)

    @cached_property
    def _token_of(self) -> dict[str, int]:
        return {gene: token for token, gene in enumerate(self.gene_ids, FIRST_GENE)}

    @classmethod
    def from_beta(cls, beta: Beta) -> Vocabulary:
        """The genes that the corpus of `beta` has in a cell, in the order of var.

        Raises InputError where there is none, as with medians that others computed.
        """
        found = (beta.n_nonzero > 0) & np.isfinite(beta.beta)
        genes = [gene for gene, has in zip(beta.feature_id, found, strict=True) if has]
        if not genes:
            raise InputError(
                "vocabulary: the medians name no gene of the corpus (those of beta.source say nothing of "
                "how many cells have a gene). Give tokens.vocabulary with them"
            )
        return cls(genes)

    @classmethod
    def from_geneformer(cls, pickle_path: str) -> Vocabulary:
        """Geneformer's token dictionary, by a restricted reader: the special tokens of V1 or of V2, then
        genes in the order of their tokens, which follow one another.

        Raises InputError for any other layout: tokens would not be those that a checkpoint was trained on.
        """
        token_of = read_pickle_dict(pickle_path)
        name_of = {token: name for name, token in token_of.items()}
        names = [name_of.get(token, "<none>") for token in range(len(token_of))]
        for version, special in GENEFORMER.items():
            genes = names[len(special) :]
            if tuple(names[: len(special)]) == special and not any(gene.startswith("<") for gene in genes):
                return cls(genes, renumbered=version == "V2")
        raise InputError(
            f"{pickle_path} is no token dictionary of Geneformer: <pad> 0, <mask> 1 and genes 2, 3, ... "
            "(V1), or <pad> 0, <mask> 1, <cls> 2, <eos> 3 and genes 4, 5, ... (V2) are expected, it begins "
            f"with {names[:6]}"
        )

    @classmethod
    def load(cls, source: str) -> Vocabulary:
        """`tokens.vocabulary`: a vocabulary.json (path or URI), or Geneformer's dictionary (.pkl)."""
        return cls.from_geneformer(source) if is_pickle(source) else cls.read(source)

    def to_json(self) -> str:
        """The file format: special tokens and genes by name, and the hash."""
        special = {"<pad>": PAD, "<mask>": MASK, "<cls>": self.cls}
        return json.dumps({"hash": self.hash, "special": special, "gene_ids": self.gene_ids}, indent=0)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "vocabulary") -> Vocabulary:
        """Reads `to_json`. Raises InputError, naming `source`, if it is something else or damaged."""
        try:
            content = json.loads(text)
            vocabulary, expected = cls(content["gene_ids"]), content["hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source} is not a vocabulary.json of langcell ({error!r})") from error
        if vocabulary.hash != expected:
            raise InputError(f"{source} is damaged: its genes do not give its hash {expected}")
        return vocabulary

    def write(self, path: str, filesystem: fs.FileSystem | None = None) -> None:
        """Writes JSON to a path or URI."""
        system, path = _locate(path, filesystem)
        with system.open_output_stream(path) as stream:
            stream.write(self.to_json().encode())

    @classmethod
    def read(cls, path: str, filesystem: fs.FileSystem | None = None) -> Vocabulary:
        """Reads what `write` wrote. Raises InputError if there is none, or it is damaged."""
        try:
            system, place = _locate(path, filesystem)
            with system.open_input_stream(place) as stream:
                text = stream.read()
        except (OSError, ValueError) as error:
            raise InputError(f"vocabulary: {path} cannot be read: {error}") from error
        return cls.from_json(text, source=path)


def _locate(path: str, filesystem: fs.FileSystem | None) -> tuple[fs.FileSystem, str]:
    if filesystem is not None:
        return filesystem, path
    return fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
