"""How counts become tokens: the options of the cells room (standard library only)."""

from dataclasses import dataclass


@dataclass
class BetaOptions:
    """The non-zero medians that genes are divided by."""

    source: str | None = None
    """Medians to take instead of the corpus's own: a beta.parquet of ours, or Geneformer's median dictionary (pickle, read by a restricted reader). None: computed on the train split."""


@dataclass
class TokenOptions:
    """The sentence of genes."""

    max_length: int = 2048
    """Most tokens of a cell, `<cls>` included (tokens); the lowest ranks are cut."""
    vocabulary: str | None = None
    """Token dictionary to take instead of the corpus's own: a vocabulary.json of ours, or Geneformer's token dictionary (pickle, read by a restricted reader). None: the genes of the corpus."""
