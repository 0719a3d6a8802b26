"""What genes are called: Ensembl ids, and reading a table that leads from symbols to them.

Studies name genes by symbol, a Census and Geneformer by Ensembl id. Which id a symbol means depends on the
annotation a study was aligned to, so the table is the user's choice and is looked up letter by letter: of
13,215 symbols of a study of 2017 Geneformer's dictionary knows 11,302, which hold 96% of its counts.
Guessing (case, former symbols) would put counts on genes that nobody measured. For the same reason a
symbol with two ids in one table is refused rather than given to either.
"""

from __future__ import annotations

import re

import pandas as pd

from langcell.cells.pickles import is_pickle, read_pickle_dict
from langcell.errors import InputError

_ENSEMBL = re.compile(r"(ENS[A-Z]{0,6}G\d{11})(\.\d+)?")

ID_COLUMNS = ("feature_id", "ensembl_id", "gene_ids", "gene_id")
"""Columns of var that hold ids where the index holds names or numbers: of a Census, of the CELLxGENE
schema's forerunners, of scanpy's reader of 10x files, of others."""
NAME_COLUMNS = ("feature_name", "gene_name", "gene_symbols", "gene_symbol", "symbol")
"""Columns of var that hold symbols, of the same."""

GENES_OF = {"homo_sapiens": "ENSG", "mus_musculus": "ENSMUSG"}
"""How the Ensembl gene ids of an organism (`census.organism`) begin."""


def ensembl_id(name: str) -> str | None:
    """The Ensembl gene id that `name` is, without its version (`ENSG00000139618.19`), or None."""
    found = _ENSEMBL.fullmatch(name)
    return found[1] if found else None


def names_in(values: pd.Series | pd.Index) -> list[str]:
    """The names of a column of var, '' where there is none."""
    missing = pd.isna(values)
    return ["" if gone else str(value).strip() for value, gone in zip(values, missing, strict=True)]


def read_symbols(path: str, option: str = "census.symbols") -> dict[str, str]:
    """Ensembl id of each symbol.

    path: `.tsv` or `.csv` of two columns, symbol and id, with or without a line of names above; or a pickled
    dictionary such as Geneformer's `gene_name_id_dict.pkl`. Lines that lack either are passed over (exports
    of Ensembl have genes without a name). Raises InputError: no such file, another layout, an id that is
    none of Ensembl's, a symbol with two ids.
    """
    if is_pickle(path):
        pairs = list(read_pickle_dict(path).items())
    elif path.endswith((".tsv", ".csv")):
        pairs = _read_table(path, option)
    else:
        raise InputError(f"{option}: {path} is of no known kind; give a .tsv, a .csv or a .pkl")
    id_of: dict[str, str] = {}
    for symbol, given in pairs:
        if not symbol or not given:
            continue
        gene = ensembl_id(str(given))
        if gene is None:
            raise InputError(
                f"{option}: {path} gives {symbol} the id {given!r}, which is no Ensembl gene id "
                "(ENSG00000139618); the columns are symbol, id"
            )
        if id_of.setdefault(symbol, gene) != gene:
            raise InputError(
                f"{option}: {path} gives {symbol} two ids, {id_of[symbol]} and {gene}; keep the one "
                "that your annotation means"
            )
    if not id_of:
        raise InputError(f"{option}: {path} holds no symbol with an id")
    return id_of


def _read_table(path: str, option: str) -> list[tuple[str, str]]:
    separator = "\t" if path.endswith(".tsv") else ","
    try:
        # No value is "missing": NA and NAN are names of genes.
        table = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{option}: {path} cannot be read: {error}") from error
    if table.shape[1] != 2:
        raise InputError(
            f"{option}: {path} has {table.shape[1]} columns; two are expected, symbol and Ensembl id"
        )
    symbols, ids = (table[column].str.strip().tolist() for column in (0, 1))
    named = ensembl_id(ids[0]) is None
    return list(zip(symbols[named:], ids[named:], strict=True))
