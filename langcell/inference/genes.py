"""Which column of a file is which gene of a trained model.

A file may name its genes by Ensembl id or by symbol, in var's index or in a column; a model knows each gene
by the id of its corpus, and by its symbol where the corpus had one. Nothing says which naming is meant, so
every usual one is tried and the one that finds the most genes is taken. Names are compared letter by letter
(`langcell.cells.symbols` says why). A naming that finds twice as many genes when capitals are ignored is of
another organism: mouse writes Cd3e where human writes CD3E, and a few genes (C3, F5) would fit by chance.

The same name twice is neither one gene nor two, so both columns are left out, as in a corpus; two names of
one gene (a former symbol and today's) are one gene, and their counts are summed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from langcell.cells.beta import Beta
from langcell.cells.symbols import GENES_OF, ID_COLUMNS, NAME_COLUMNS, ensembl_id, names_in
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError

_CALLED = {
    "homo_sapiens": {"homo_sapiens", "human", "ncbitaxon:9606"},
    "mus_musculus": {"mus_musculus", "mouse", "ncbitaxon:10090"},
}
"""What obs or uns may call an organism, in lower case and with _ for a blank."""
FEW = 0.1
"""Share of the model's genes below which a study is said to have few: whole-transcriptome chemistry measures
most of any vocabulary, a targeted panel some hundred genes."""
_UNSAID = {"", "unknown", "na", "nan", "none"}


@dataclass(frozen=True, eq=False)
class FileGenes:
    """The columns of a file as genes of a model.

    gene: int64 [columns], row of the model's `Beta`, -1 for a column that is no token; naming: how they were
    found, in words; duplicated: columns left out because their name stands twice.
    """

    gene: np.ndarray
    naming: str
    duplicated: int

    @property
    def n(self) -> int:
        """Genes found (several columns may be one)."""
        return len(np.unique(self.gene[self.gene >= 0]))


def refuse_other_organism(
    var: pd.DataFrame, obs: pd.DataFrame, uns: Mapping[str, Any], organism: str
) -> None:
    """Raises InputError if genes or cells are said to be of another organism than `organism`.

    By the Ensembl ids of var, where ids are usually written (any other column may hold orthologues), and by
    `organism` and `organism_ontology_term_id` of obs or uns, as CELLxGENE's schema has them.
    """
    _refuse_other_genes(_texts(var, ID_COLUMNS), organism)
    called = _CALLED.get(organism, {organism})
    # An ontology id can be compared only with a known one.
    for name in ("organism", "organism_ontology_term_id") if organism in _CALLED else ("organism",):
        said = Counter(obs[name].value_counts().to_dict() if name in obs else {})
        if isinstance(uns.get(name), str):
            said[uns[name]] += len(obs)
        for value, cells in said.items():
            plain = str(value).strip().lower().replace(" ", "_")
            if cells and plain not in called | _UNSAID:
                raise InputError(
                    f"{name} of {cells:,} of {len(obs):,} cells is {value}, but the model was trained on "
                    f"{organism}. Leave these cells out, or give a model of their organism"
                )


def find_genes(
    var: pd.DataFrame, vocabulary: Vocabulary, beta: Beta, symbols: Mapping[str, str] | None
) -> FileGenes:
    """The naming of `var` that finds the most genes; the first of several.

    vocabulary, beta: the model's; a gene counts if it has a token and a median. symbols: id by symbol,
    beside what beta knows; it comes first. Warns of duplicated names, and of few genes. Raises InputError
    where no gene is found, or more of them if capitals are ignored.
    """
    texts = _texts(var, (*ID_COLUMNS, *NAME_COLUMNS))
    namings = {place: [ensembl_id(name) or name for name in names] for place, names in texts.items()}
    row_of = {beta.feature_id[row]: int(row) for row in known_genes(vocabulary, beta)}
    id_of = {**_names_of(beta), **(symbols or {})}
    found = [_find(place, names, row_of, id_of) for place, names in namings.items()]
    best = max(found, key=lambda genes: genes.n)  # the first of equals
    _refuse_other_capitals(namings, {*row_of, *(s for s, gene in id_of.items() if gene in row_of)}, best.n)
    if not best.n:
        _refuse_unknown(namings, row_of, beta)
    warn_of_few(best.n, len(row_of), f"the file ({best.naming})")
    if best.duplicated:
        warnings.warn(
            f"langcell: {best.duplicated} columns ({best.naming}) are left out of the sentences, because "
            "their names stand more than once and nobody knows which is right; their counts stay in the "
            "totals of the cells",
            stacklevel=3,
        )
    return best


def known_genes(vocabulary: Vocabulary, beta: Beta) -> np.ndarray:
    """Rows of beta that a sentence can hold, ascending: genes with a token and a median."""
    return np.flatnonzero(
        (vocabulary.tokens_of(beta.feature_id) != 0) & np.isfinite(beta.beta) & (beta.beta > 0)
    )


def warn_of_few(found: int, known: int, place: str) -> None:
    """Warn where `found` is less than `FEW` of the `known` genes of a model. place: what has them."""
    if found < FEW * known:
        warnings.warn(
            f"langcell: {place} has {found:,} of the model's {known:,} genes: its sentences are short, and "
            "what the model is known to reach does not hold for them",
            stacklevel=4,
        )


def _texts(var: pd.DataFrame, usual: Sequence[str]) -> dict[str, list[str]]:
    """The index, and those of the usual columns that are there and are text, by their names in a message."""
    text = [name for name in usual if name in var and not pd.api.types.is_numeric_dtype(var[name])]
    columns = {f"var[{name!r}]": var[name] for name in text}
    return {place: names_in(values) for place, values in {"var_names": var.index, **columns}.items()}


def _names_of(beta: Beta) -> dict[str, str]:
    """Id of each symbol that beta gives to one gene alone."""
    times = Counter(beta.feature_name)
    pairs = zip(beta.feature_name, beta.feature_id, strict=True)
    return {symbol: gene for symbol, gene in pairs if symbol and times[symbol] == 1}


def _find(place: str, names: list[str], row_of: dict[str, int], id_of: dict[str, str]) -> FileGenes:
    """The genes by one naming: each name as an id or, where it is none, as a symbol."""
    by_id = np.array([row_of.get(name, -1) for name in names], np.int64)
    by_symbol = np.array([row_of.get(id_of.get(name, ""), -1) for name in names], np.int64)
    gene = np.where(by_id >= 0, by_id, by_symbol)
    times = Counter(name for name, row in zip(names, gene, strict=True) if row >= 0)
    twice = np.array([times[name] > 1 for name in names], bool)
    kind = "ids" if 2 * np.count_nonzero(by_id >= 0) > np.count_nonzero(gene >= 0) else "symbols"
    return FileGenes(np.where(twice, -1, gene), f"{kind} of {place}", int(twice.sum()))


def _refuse_other_genes(texts: dict[str, list[str]], organism: str) -> None:
    """Raises InputError if a column is of another organism's Ensembl ids, and none is of this one's."""
    place_of: dict[str, str] = {}
    for place, names in texts.items():
        prefixes = Counter(gene[:-11] for gene in map(ensembl_id, names) if gene)  # before the digits
        for prefix, n in prefixes.most_common(1):
            if 2 * n > len(names):
                place_of.setdefault(prefix, place)
    if organism not in GENES_OF or GENES_OF[organism] in place_of:
        return
    organism_of = {prefix: name for name, prefix in GENES_OF.items()}
    for prefix, place in place_of.items():
        other = organism_of.get(prefix, "another organism")
        raise InputError(
            f"{place} holds genes of {other} ({prefix}...), but the model was trained on {organism}. "
            f"Give cells of {organism}, or a model of {other}"
        )


def _refuse_other_capitals(namings: dict[str, list[str]], known: set[str], n: int) -> None:
    """Raises InputError if more names of a column are known but for their capitals than the `n` found."""
    written = {name.casefold(): name for name in known}
    for place, names in namings.items():
        alike = [name for name in dict.fromkeys(names) if name not in known and name.casefold() in written]
        if len(alike) > n:
            raise InputError(
                f"{place} has {alike[0]} where the model has {written[alike[0].casefold()]}, and so with "
                f"{len(alike):,} genes: these are symbols of another organism (mouse genes are written Cd3e, "
                "human ones CD3E). Give cells of the model's organism; if they are, write the symbols as the "
                "model does"
            )


def _refuse_unknown(namings: dict[str, list[str]], row_of: dict[str, int], beta: Beta) -> None:
    names = namings["var_names"]
    model = []
    for gene, row in list(row_of.items())[:3]:
        symbol = beta.feature_name[row]
        model.append(f"{gene} ({symbol})" if symbol not in ("", gene) else gene)
    raise InputError(
        f"none of the {len(names):,} genes of the file ({', '.join(names[:3])}, ...) is one of the "
        f"{len(row_of):,} of the model ({', '.join(model)}, ...). Looked at: {', '.join(namings)}. Put "
        "Ensembl ids or symbols as the model has them into var_names, or give a table of symbols"
    )
