"""Symbols lead to one Ensembl id each, letter by letter."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from langcell.cells.symbols import ensembl_id, read_symbols
from langcell.errors import InputError

TP53, BRCA2 = "ENSG00000141510", "ENSG00000139618"


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        (TP53, TP53),
        (f"{BRCA2}.19", BRCA2),
        ("ENSMUSG00000059552", "ENSMUSG00000059552"),
        ("TP53", None),
        ("ENST00000269305", None),  # a transcript
        (f"{TP53}_PAR_Y", None),
        ("ENSG0000014151", None),
        ("", None),
    ],
)
def test_ensembl_ids_are_known_by_their_form(name: str, gene: str | None) -> None:
    assert ensembl_id(name) == gene


@pytest.mark.parametrize("head", ["", "symbol\tid\n"])
def test_tables_may_name_their_columns(tmp_path: Path, head: str) -> None:
    path = tmp_path / "symbols.tsv"
    path.write_text(f"{head}TP53\t{TP53}\nBRCA2\t{BRCA2}.19\n")
    assert read_symbols(str(path)) == {"TP53": TP53, "BRCA2": BRCA2}


def test_a_gene_may_be_called_na(tmp_path: Path) -> None:
    path = tmp_path / "symbols.csv"
    path.write_text(f"NA,{TP53}\nNAN , {BRCA2}\n,ENSG00000000003\nunmapped,\n")
    assert read_symbols(str(path)) == {"NA": TP53, "NAN": BRCA2}


def test_a_pickled_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "symbols.pkl"
    path.write_bytes(pickle.dumps({"TP53": TP53}))
    assert read_symbols(str(path)) == {"TP53": TP53}


def test_geneformer_dictionary(shared: Path) -> None:
    id_of = read_symbols(str(shared / "geneformer" / "gene_name_id_dict.pkl"))
    assert len(id_of) == 40_247  # one of its 40,248 names is empty
    assert (id_of["TP53"], id_of["BRCA2"]) == (TP53, BRCA2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.tsv", None, r"none\.tsv cannot be read"),
        ("empty.csv", "", r"empty\.csv cannot be read"),
        ("a.txt", "", r"a\.txt is of no known kind"),
        ("a.tsv", f"TP53\t{TP53}\tx\n", "has 3 columns; two are expected"),
        ("a.tsv", f"TP53,{TP53}\n", "has 1 columns"),
        ("a.csv", f"TP53,{TP53}\nBRCA2,P51587\n", "gives BRCA2 the id 'P51587', which is no Ensembl gene id"),
        ("a.csv", f"TP53,{TP53}\nTP53,{BRCA2}\n", f"gives TP53 two ids, {TP53} and {BRCA2}"),
        ("a.csv", "symbol,id\n", "holds no symbol"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"census.symbols: .*{message}"):
        read_symbols(str(tmp_path / name))
