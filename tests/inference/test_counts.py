"""Sentences of an AnnData are those of a plain tokenizer under the model's medians, however it is stored."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.batch import Packed
from langcell.cells.beta import Beta
from langcell.cells.symbols import read_symbols
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError
from langcell.inference import counts as counts_module
from langcell.inference.counts import Counts


def ensembl(i: int, prefix: str = "ENSG") -> str:
    return f"{prefix}{i:011d}"


IDS = [ensembl(i) for i in range(6)]
SYMBOLS = ["CD3E", "CD8A", "MS4A1", "LYZ", "NKG7", ""]
BETA = Beta(IDS, SYMBOLS, np.full(6, 9), np.array([1.0, 2.0, 4.0, 1.0, 3.0, np.nan], np.float32))
VOCABULARY = Vocabulary([IDS[i] for i in (3, 0, 1, 4, 5)])  # ids[2] is no token, ids[5] has no median
CLS = VOCABULARY.cls


def lists(packed: Packed) -> list[list[int]]:
    ends = packed.cu_seqlens_B1.tolist()
    tokens = packed.tokens_T.tolist()
    return [tokens[a:b] for a, b in pairwise(ends)]


def read(adata: AnnData, vocabulary: Vocabulary = VOCABULARY, beta: Beta = BETA, **more) -> list[list[int]]:
    options = {"organism": "homo_sapiens", "max_length": 2048} | more
    return lists(Counts.of(adata, vocabulary, beta, **options).sentences(0, adata.n_obs))


def plain(
    dense: np.ndarray, totals: np.ndarray, ids: list[str], median: dict[str, float], vocabulary: Vocabulary
) -> list[list[int]]:
    """Plain NumPy, a cell at a time: genes in the order of `median`, then a stable sort."""
    column = {gene: i for i, gene in enumerate(ids)}
    token_of = {gene: 2 + i for i, gene in enumerate(vocabulary.gene_ids)}
    genes = [gene for gene in median if gene in column and gene in token_of]
    token = np.array([token_of[gene] for gene in genes])
    values = dense[:, [column[gene] for gene in genes]].astype(np.float64)
    beta = np.array([median[gene] for gene in genes])
    sentences = []
    for row, total in zip(values, totals, strict=True):
        kept = np.flatnonzero(row)
        order = np.argsort(-(row[kept] / total * 10_000 / beta[kept]), kind="stable")
        sentences.append([vocabulary.cls, *token[kept[order]].tolist()][:2048])
    return sentences


def adata_of(counts, names: list[str], **columns: list[str]) -> AnnData:
    counts = np.asarray(counts, np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts))])
    return AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(columns, index=names))


@pytest.fixture(scope="module")
def geneformer(shared: Path) -> tuple[Vocabulary, Beta]:
    folder = shared / "geneformer"
    vocabulary = Vocabulary.from_geneformer(str(folder / "token_dictionary.pkl"))
    return vocabulary, Beta.from_geneformer(str(folder / "gene_median_dictionary.pkl"))


@pytest.fixture(scope="module")
def zheng(shared: Path) -> AnnData:
    """150 sorted cells of ten types, genes by id and symbol."""
    return anndata.read_h5ad(shared / "zheng_facs_pbmc_counts.h5ad")[::26].copy()


@pytest.fixture(scope="module")
def zheng_plain(zheng: AnnData, geneformer: tuple[Vocabulary, Beta]) -> list[list[int]]:
    vocabulary, beta = geneformer
    dense = zheng.X.toarray()
    median = dict(zip(beta.feature_id, beta.beta, strict=True))
    return plain(dense, dense.sum(1, dtype=np.float64), list(zheng.var_names), median, vocabulary)


def stored(adata: AnnData, how: str, folder: Path) -> AnnData:
    """The same cells, stored otherwise."""
    path, other = folder / "cells.h5ad", adata.copy()
    if how == "shuffled":
        return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    if how == "view":
        return anndata.concat([adata, adata], merge="same")[adata.n_obs :]
    if "csc" in how:
        other.X = other.X.tocsc()
    elif "dense" in how:
        other.X = other.X.toarray()
    elif how == "int64":
        other.X = other.X.astype(np.int64)
    elif how == "uint16":
        other.X = other.X.toarray().astype(np.uint16)
    elif how == "array":
        other.X = sp.csr_array(other.X)
    elif how == "unsorted":
        other.X = other.X[:, ::-1][:, ::-1]
        other.X.indices[:2], other.X.data[:2] = other.X.indices[1::-1].copy(), other.X.data[1::-1].copy()
        other.X.has_sorted_indices = False
    elif "raw" in how:
        other.raw = other.copy()
        other = other[:, :50].copy()
        other.X = np.log1p(other.X)
    if not how.startswith("backed"):
        return other
    if how == "backed view":
        other = anndata.concat([adata, adata], merge="same")
    other.write_h5ad(path)
    backed = anndata.read_h5ad(path, backed="r")
    return backed[adata.n_obs :] if how == "backed view" else backed


@pytest.mark.parametrize(
    "how",
    [
        *("csr", "csc", "dense", "int64", "uint16", "array", "unsorted", "view", "shuffled", "raw"),
        *("backed csr", "backed dense", "backed view", "backed raw"),
    ],
)
def test_storage_makes_no_difference(
    how: str,
    zheng: AnnData,
    zheng_plain: list[list[int]],
    geneformer: tuple[Vocabulary, Beta],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts_module, "ROWS", 64)  # three pieces
    adata = stored(zheng, how, tmp_path)
    assert adata.isbacked == how.startswith("backed")
    assert read(adata, *geneformer, layer="raw" if "raw" in how else None) == zheng_plain


def test_symbols_of_a_table(shared: Path, geneformer: tuple[Vocabulary, Beta]) -> None:
    vocabulary, beta = geneformer
    adata = anndata.read_h5ad(shared / "ifnb_kang_pbmc_counts.h5ad")[::20].copy()
    id_of = read_symbols(str(shared / "geneformer" / "gene_name_id_dict.pkl"))
    found = Counts.of(adata, vocabulary, beta, organism="homo_sapiens", max_length=2048, symbols=id_of)
    assert found.naming == "symbols of var_names"
    dense = adata.X.toarray()
    ids = [id_of.get(symbol, "") for symbol in adata.var_names]
    tokens = set(vocabulary.gene_ids)
    known = [gene for gene in ids if gene in tokens]
    assert found.genes == len(set(known)) > 11_000
    assert len(known) == found.genes  # no two symbols of one gene here, so `plain` need not sum
    median = dict(zip(beta.feature_id, beta.beta, strict=True))
    expected = plain(dense, dense.sum(1, dtype=np.float64), ids, median, vocabulary)
    assert lists(found.sentences(0, found.n)) == expected
    with pytest.raises(InputError, match="give a table of symbols"):
        read(adata, vocabulary, beta)


def test_medians_are_those_of_the_model_never_of_the_cohort(
    zheng: AnnData, zheng_plain: list[list[int]], geneformer: tuple[Vocabulary, Beta]
) -> None:
    kind = (zheng.obs["celltype"] == "CD19+ B").to_numpy()
    cohort = zheng[kind].copy()
    expected = [sentence for sentence, inside in zip(zheng_plain, kind, strict=True) if inside]
    assert read(cohort, *geneformer) == expected
    assert read(cohort[:1], *geneformer) == expected[:1]  # one cell

    dense = cohort.X.toarray().astype(np.float64)
    totals = dense.sum(1)
    normalised = dense / totals[:, None] * 10_000
    normalised[normalised == 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genes without a cell
        own = dict(zip(cohort.var_names, np.nanmedian(normalised, axis=0), strict=True))
    recomputed = plain(dense, totals, list(cohort.var_names), own, geneformer[0])
    assert len(expected) > 10
    assert all(a != b for a, b in zip(expected, recomputed, strict=True))


def test_ties_follow_the_corpus_and_not_the_columns_of_the_file(
    zheng: AnnData, geneformer: tuple[Vocabulary, Beta], tmp_path: Path
) -> None:
    """Equal medians, as many rare genes of a small corpus have: nearly every gene is tied with others."""
    vocabulary, beta = geneformer
    flat = Beta(beta.feature_id, beta.feature_name, beta.n_nonzero, np.ones(len(beta.beta), np.float32))
    shuffled = stored(zheng, "shuffled", tmp_path)
    dense = zheng.X.toarray()
    totals = dense.sum(1, dtype=np.float64)
    ids = list(zheng.var_names)
    expected = plain(dense, totals, ids, dict.fromkeys(beta.feature_id, 1.0), vocabulary)
    assert read(zheng, vocabulary, flat) == read(shuffled, vocabulary, flat) == expected
    by_file = plain(dense, totals, ids, dict.fromkeys(shuffled.var_names, 1.0), vocabulary)
    assert all(a != b for a, b in zip(expected, by_file, strict=True))


def test_a_model_whose_ids_are_symbols(zheng: AnnData, geneformer: tuple[Vocabulary, Beta]) -> None:
    """As the demo's: the same genes, named otherwise, make the same sentences."""
    vocabulary, beta = geneformer
    once = ~zheng.var["feature_name"].duplicated(keep=False).to_numpy()
    genes = zheng[:, once & zheng.var_names.isin(vocabulary.gene_ids)].copy()
    name_of = dict(zip(genes.var_names, genes.var["feature_name"], strict=True))
    rows = [i for i, gene in enumerate(beta.feature_id) if gene in name_of]
    names = [name_of[beta.feature_id[i]] for i in rows]
    by_name = Beta(names, names, beta.n_nonzero[rows], beta.beta[rows])
    by_id = Beta([beta.feature_id[i] for i in rows], names, beta.n_nonzero[rows], beta.beta[rows])
    model = Vocabulary(names)
    found = Counts.of(genes, model, by_name, organism="homo_sapiens", max_length=2048)
    assert (found.naming, found.genes) == ("ids of var['feature_name']", len(rows))
    assert lists(found.sentences(0, found.n)) == read(genes, Vocabulary(by_id.feature_id), by_id)

    unnamed = genes.copy()
    unnamed.var = pd.DataFrame(index=genes.var["feature_name"].tolist())
    found = Counts.of(unnamed, Vocabulary(by_id.feature_id), by_id, organism="homo_sapiens", max_length=2048)
    assert (found.naming, found.genes) == ("symbols of var_names", len(rows))
    assert read(unnamed, model, by_name) == read(genes, model, by_name)


@st.composite
def files(draw: st.DrawFn) -> tuple[AnnData, dict[str, str]]:
    """Columns named by symbols of the model, former symbols, ids with a version, and unknown names; some
    twice."""
    former = {"T3E": IDS[0], "LYZL": IDS[3], "OLD8": IDS[1]}
    names = [*SYMBOLS[:5], *former, f"{IDS[5]}.2", f"{IDS[4]}.11", "UNKNOWN", ""]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return adata_of(rng.integers(0, 4, (4, len(chosen))), chosen), former


@given(given_file=files())
@settings(max_examples=150, deadline=None)
def test_any_naming_equals_a_dictionary_of_genes(given_file: tuple[AnnData, dict[str, str]]) -> None:
    adata, former = given_file
    names = [name.split(".")[0] for name in adata.var_names]
    id_of = {**dict(zip(SYMBOLS[:5], IDS, strict=False)), **dict(zip(IDS, IDS, strict=True)), **former}
    tokens = {gene: 2 + i for i, gene in enumerate(VOCABULARY.gene_ids) if gene != IDS[5]}
    used = {n for n in names if names.count(n) == 1 and id_of.get(n) in tokens}
    dense = adata.X.toarray()
    expected = []
    for row in dense:
        count: dict[str, float] = {}
        for name, x in zip(names, row, strict=True):
            if name in used and x:
                count[id_of[name]] = count.get(id_of[name], 0) + float(x)
        total = float(row.sum())
        value = {gene: x / total * 10_000 / float(BETA.beta[IDS.index(gene)]) for gene, x in count.items()}
        ranked = sorted(value, key=lambda gene: (-value[gene], gene))
        expected.append([CLS, *(tokens[gene] for gene in ranked)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not used:
            with pytest.raises(InputError, match="none of the"):
                read(adata, symbols=former)
            return
        assert read(adata, symbols=former) == expected
    twice = sum(names.count(n) > 1 and id_of.get(n) in tokens for n in names)
    told = [str(w.message) for w in caught if str(w.message).startswith("langcell:")]
    assert [message.split()[1] for message in told] == ([str(twice)] if twice else [])


def test_the_naming_with_most_genes_is_taken() -> None:
    index = ["LYZ", "x1", "x2", "x3"]
    adata = adata_of(
        [[1, 2, 3, 4]], index, gene_symbols=["CD3E", "CD8A", "x", "y"], gene_ids=[f"{i}.3" for i in IDS[:4]]
    )
    adata.var["chromosome"] = ["1", "2", "3", "4"]
    found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=9)
    assert (found.naming, found.genes) == ("ids of var['gene_ids']", 3)
    del adata.var["gene_ids"]
    found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=9)
    assert (found.naming, found.genes) == ("symbols of var['gene_symbols']", 2)


def test_a_symbol_of_two_genes_is_given_to_neither() -> None:
    beta = Beta(IDS, ["A", "A", "B", "LYZ", "NKG7", ""], BETA.n_nonzero, BETA.beta)
    assert read(adata_of([[5, 1]], ["A", "LYZ"]), beta=beta) == [[CLS, 2]]
    assert read(adata_of([[5, 1]], ["A", "LYZ"]), beta=beta, symbols={"A": IDS[0]}) == [[CLS, 3, 2]]


def test_names_that_stand_twice_are_left_out_but_counted() -> None:
    # Values without LYZ: CD3E 4/10, NKG7 2/10/3; LYZ would be the first.
    adata = adata_of([[4, 2, 3, 1]], ["CD3E", "NKG7", "LYZ", "LYZ"])
    adata.obs["raw_sum"] = np.nan  # not stated
    with pytest.warns(UserWarning, match=r"^langcell: 2 columns \(symbols of var_names\)") as caught:
        found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=9)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert lists(found.sentences(0, 1)) == [[CLS, 3, 5]]
    assert found._read(0, 1)[1].tolist() == [10]


@pytest.mark.parametrize(("raw_sum", "second"), [(None, 1 + 2), (1e6, 1e6), (np.nan, 1 + 2)])
def test_totals_are_those_stated(raw_sum: float | None, second: float) -> None:
    adata = adata_of([[3, 1, 4], [1, 2, 0]], ["CD3E", "LYZ", "OTHER"])
    if raw_sum is not None:
        adata.obs["raw_sum"] = [8, raw_sum]
    found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=9)
    _, totals = found._read(0, 2)
    assert totals.tolist() == [8, second]


def test_totals_that_cannot_be_are_refused() -> None:
    adata = adata_of([[3, 1], [1, 2]], ["CD3E", "LYZ"])
    adata.obs["raw_sum"] = [4, 2]
    with pytest.raises(InputError, match=r"cell cell1 of X: its total \(raw_sum.*Mend obs\['raw_sum'\]"):
        read(adata)
    adata.obs["raw_sum"] = ["many", "few"]
    with pytest.raises(InputError, match=r"obs\['raw_sum'\] holds no numbers"):
        read(adata)


def test_cells_without_a_gene_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts_module, "ROWS", 2)
    adata = adata_of([[5, 0], [0, 9], [1, 0], [0, 0], [2, 1]], ["CD3E", "OTHER"])
    adata.X.data[0] = 0  # a stored zero
    found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=9)
    assert not found.empty_N.any()  # nothing was read yet
    assert lists(found.sentences(0, 5)) == [[CLS], [CLS], [CLS, 3], [CLS], [CLS, 3]]
    assert found.empty_N.tolist() == [True, True, False, True, False]


def test_chunks_are_the_whole_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts_module, "ROWS", 3)
    adata = adata_of(np.random.default_rng(0).integers(0, 5, (17, 4)), ["CD3E", "CD8A", "LYZ", "NKG7"])
    found = Counts.of(adata, VOCABULARY, BETA, organism="homo_sapiens", max_length=3)
    whole = lists(found.sentences(0, 17))
    assert max(map(len, whole)) == 3
    for cells in (1, 5, 17, 4096):
        parts = list(found.chunks(cells))
        assert [first for first, _ in parts] == list(range(0, 17, cells))
        assert [sentence for _, part in parts for sentence in lists(part)] == whole
    assert lists(found.sentences(4, 9)) == whole[4:9]
    assert lists(found.sentences(6, 6)) == []


def test_the_cells_stay_as_they_were(
    zheng: AnnData, geneformer: tuple[Vocabulary, Beta], tmp_path: Path
) -> None:
    adata = zheng.copy()
    adata.layers["counts"] = stored(zheng, "unsorted", tmp_path).X
    before = adata.copy()
    read(adata, *geneformer)
    read(adata, *geneformer, layer="counts")
    for matrix, old in ((adata.X, before.X), (adata.layers["counts"], before.layers["counts"])):
        assert (matrix.indices == old.indices).all()
        assert (matrix.data == old.data).all()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)


@pytest.mark.parametrize("layer", [None, "scaled"])
def test_values_that_are_no_counts_are_refused_with_the_remedy(layer: str | None) -> None:
    adata = adata_of([[3, 1, 0], [1, 2, 2]], ["CD3E", "LYZ", "OTHER"])
    raw = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(raw.toarray()))
    adata.layers["scaled"] = raw.toarray() - 1.5
    place = "X" if layer is None else r"layers\['scaled'\]"
    kind = r"log-normalised values \(1\.386, \.\.\.\)" if layer is None else r"scaled values \(1\.5, \.\.\.\)"
    with pytest.raises(InputError, match=f"^{place} holds {kind}, but raw counts.* No other matrix there"):
        read(adata, layer=layer)
    adata.layers["counts"] = raw
    with pytest.raises(InputError, match=r"layers\['counts'\] holds whole numbers: give layer='counts'"):
        read(adata, layer=layer)
    adata.raw = AnnData(raw, obs=adata.obs, var=adata.var)
    with pytest.raises(InputError, match="raw holds whole numbers: give layer='raw'"):
        read(adata, layer=layer)
    assert read(adata, layer="raw") == read(adata, layer="counts") == [[CLS, 3, 2], [CLS, 2, 3]]
    if layer is not None:
        adata.X = raw
        with pytest.raises(InputError, match="X holds whole numbers: give layer=None"):
            read(adata, layer=layer)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, "a count is negative"),
        (np.nan, "a count is NaN or infinite"),
        (0.5, "a count is no whole number"),
    ],
)
def test_a_bad_cell_is_named_when_it_is_read(
    value: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts_module, "ROWS", 4)
    counts = np.ones((11, 2), np.float32)
    counts[9, 1] = value  # of a gene that is no token
    found = Counts.of(
        adata_of(counts, ["CD3E", "OTHER"]), VOCABULARY, BETA, organism="homo_sapiens", max_length=9
    )
    assert len(lists(found.sentences(0, 8))) == 8
    with pytest.raises(InputError, match=f"^cell cell9 of X: {reason}"):
        list(found.chunks())


def test_counts_recovered_by_a_division_are_whole_up_to_rounding() -> None:
    counts = np.array([[3, 1], [1, 2]]) * (1 + 1e-12)
    adata = AnnData(counts, var=pd.DataFrame(index=["CD3E", "LYZ"]))
    assert read(adata) == [[CLS, 3, 2], [CLS, 2, 3]]


def test_mouse_cells_are_refused_by_name(shared: Path, geneformer: tuple[Vocabulary, Beta]) -> None:
    adata = anndata.read_h5ad(shared / "mouse_val.h5ad")
    message = r"genes of mus_musculus \(ENSMUSG\.\.\.\), but the model was trained on homo_sapiens"
    for file in (adata, anndata.read_h5ad(shared / "mouse_val.h5ad", backed="r")):
        with pytest.raises(InputError, match=message):
            read(file, *geneformer)

    id_of = read_symbols(str(shared / "geneformer" / "gene_name_id_dict.pkl"))
    adata.var = adata.var[["gene_name"]]  # symbols alone: obs says it
    with pytest.raises(
        InputError, match=r"organism of 1,000 of 1,000 cells is Mus musculus, but .* homo_sap"
    ):
        read(adata, *geneformer, symbols=id_of)
    del adata.obs["organism"]
    with pytest.raises(InputError, match=r"organism_ontology_term_id of .* is NCBITaxon:10090"):
        read(adata, *geneformer, symbols=id_of)
    del adata.obs["organism_ontology_term_id"]  # nothing but its symbols tells
    with pytest.raises(InputError, match=r"var\['gene_name'\] has Htr7 where the model has HTR7"):
        read(adata, *geneformer, symbols=id_of)


def test_the_organism_of_a_file_may_stand_in_uns_or_nowhere() -> None:
    adata = adata_of([[1, 2]], ["CD3E", "LYZ"])
    for said in ("Homo sapiens", "human", "unknown"):
        adata.uns["organism"] = adata.obs["organism"] = said
        assert read(adata) == [[CLS, 2, 3]]
    adata.uns["organism"] = "Rattus norvegicus"
    with pytest.raises(InputError, match="organism of 1 of 1 cells is Rattus norvegicus"):
        read(adata)
    del adata.uns["organism"], adata.obs["organism"]
    with pytest.raises(InputError, match="another organism"):
        read(adata_of([[1]], [ensembl(1, "ENSRNOG")]))
    with pytest.raises(InputError, match=r"genes of homo_sapiens \(ENSG\.\.\.\), but .* mus_musculus"):
        read(adata_of([[1]], [ensembl(1)]), organism="mus_musculus")


def test_orthologues_beside_own_ids_are_no_other_organism() -> None:
    adata = adata_of([[1, 2]], IDS[:2], mouse_gene=[ensembl(1, "ENSMUSG"), ensembl(2, "ENSMUSG")])
    assert read(adata) == [[CLS, 3, 4]]
    adata.var_names = SYMBOLS[:2]
    assert read(adata) == [[CLS, 3, 4]]
    adata.var["ensembl_id"] = adata.var.pop("mouse_gene")  # there a file has the ids of its own genes
    with pytest.raises(InputError, match=r"var\['ensembl_id'\] holds genes of mus_musculus"):
        read(adata)


def test_no_gene_of_the_vocabulary() -> None:
    adata = adata_of([[1, 2, 3, 4]], ["p53", "p63", "p73", "p83"])
    with pytest.raises(InputError) as error:
        read(adata)
    told = str(error.value)
    assert "none of the 4 genes of the file (p53, p63, p73, ...) is one of the 4 of the model" in told
    assert f"({IDS[0]} (CD3E), {IDS[1]} (CD8A), {IDS[3]} (LYZ), ...)" in told


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    adata = adata_of([[1, 2]], ["CD3E", "LYZ"])
    with pytest.raises(InputError, match="holds no cells"):
        read(adata[:0])
    with pytest.raises(InputError, match=r"no layers\['counts'\]. It has: X; name"):
        read(adata, layer="counts")
    with pytest.raises(InputError, match="adata has no raw"):
        read(adata, layer="raw")
    adata.layers["counts"] = adata.X.copy()
    adata.X = None
    with pytest.raises(InputError, match=r"adata has no X\..*give layer='counts'"):
        read(adata)
    by_column = adata_of([[1, 2]], ["CD3E", "LYZ"])
    by_column.X = by_column.X.tocsc()
    by_column.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(InputError, match=r"X is stored by columns \(CSC\).*a\.X\.tocsr\(\)"):
        read(anndata.read_h5ad(tmp_path / "csc.h5ad", backed="r"))
