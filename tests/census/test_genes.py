"""Columns of several files become one list of genes, and none changes its meaning on the way."""

from __future__ import annotations

import pandas as pd
import pytest

from langcell.census.genes import FileGenes, columns_in, file_genes, union
from langcell.errors import InputError

A, B, C = "ENSG00000000001", "ENSG00000000002", "ENSG00000000003"
SYMBOLS = {"a": A, "alias": A, "b": B}


def genes_of(
    index: list[str],
    symbols: dict[str, str] | None = None,
    *,
    column: str | None = None,
    skip: bool = False,
    organism: str = "homo_sapiens",
    **columns: list[str],
) -> FileGenes:
    var = pd.DataFrame(columns, index=index)
    return file_genes(var, column, symbols, organism, "f.h5ad", skip)


def test_ids_lose_their_version_and_symbols_become_ids() -> None:
    genes = genes_of([f"{C}.7", "a", "b", "spike-in"], SYMBOLS)
    assert genes.feature_id == [C, A, B, ""]
    assert genes.feature_name[:3] == [C, "a", "b"]
    assert (genes.unmapped, genes.duplicated) == (1, 0)


def test_without_a_table_names_stand_as_they_are() -> None:
    genes = genes_of([f"{C}.7", "a", "spike-in"])
    assert genes.feature_id == [C, "a", "spike-in"]
    assert genes.unmapped == 0


def test_two_symbols_of_one_gene_are_one_gene() -> None:
    genes = genes_of(["a", "alias"], SYMBOLS)
    assert genes.feature_id == [A, A]
    assert genes.duplicated == 0
    assert union({"f": genes})["feature_name"].to_pylist() == ["a"]


@pytest.mark.parametrize("name", ["feature_id", "ensembl_id", "gene_ids"])
def test_ids_are_found_beside_an_index_of_numbers(name: str) -> None:
    genes = genes_of(["0", "1"], feature_name=["a", "b"], **{name: [A, B]})
    assert genes.feature_id == [A, B]
    assert genes.feature_name == ["a", "b"]


def test_an_index_of_ids_and_a_named_column_go_first() -> None:
    assert genes_of([A, B], ensembl_id=[B, C]).feature_id == [A, B]
    assert genes_of([A, B], column="x", x=[B, C]).feature_id == [B, C]


def test_columns_of_a_name_that_stands_twice_are_left_out_on_request() -> None:
    genes = genes_of([A, f"{A}.2", "b", "c"], skip=True)
    assert genes.feature_id == ["", "", "b", "c"]
    assert (genes.unmapped, genes.duplicated) == (0, 2)
    # What leaves the corpus anyway may stand twice.
    assert genes_of(["a", "x", "x"], SYMBOLS).duplicated == 0


def test_the_union_is_sorted_and_depends_on_no_order() -> None:
    one, two = genes_of(["b", "a"], SYMBOLS), genes_of([A, C])
    joined = union({"1": one, "2": two})
    assert joined["feature_id"].to_pylist() == [A, B, C]
    assert joined["feature_name"].to_pylist() == ["a", "b", C]
    assert joined["soma_joinid"].to_pylist() == [0, 1, 2]
    assert union({"2": two, "1": one}).equals(joined)
    ids = joined["feature_id"].to_pylist()
    assert columns_in(ids, one.feature_id).tolist() == [1, 0]
    assert columns_in(ids, ["", C]).tolist() == [-1, 2]


def test_bad_genes_are_named() -> None:
    with pytest.raises(InputError, match=r"f\.h5ad: var has no column x, .* It has: y"):
        genes_of([A], column="x", y=[A])
    with pytest.raises(InputError, match=rf"f\.h5ad: var has {A} 2 times \(1 such names\): duplicated"):
        genes_of([A, B, f"{A}.1"])
    with pytest.raises(InputError, match=r"f\.h5ad: none of its 2 genes \(x, y, \.\.\.\) has an id"):
        genes_of(["x", "y"], SYMBOLS)
    with pytest.raises(InputError, match=rf"gene {A} is not of mus_musculus \(ENSMUSG\.\.\.\)"):
        genes_of(["a"], SYMBOLS, organism="mus_musculus")
    with pytest.raises(InputError, match=r"gene ENSGALG00000000003 is not of homo_sapiens"):  # chicken
        genes_of(["ENSGALG00000000003"])
    with pytest.raises(InputError, match=r"2 has Ensembl ids and 1 other names of genes"):
        union({"1": genes_of(["a", "b"]), "2": genes_of([A, B])})
