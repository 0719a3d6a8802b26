"""A cell that cannot be used is named, or left out of everything and counted; a damaged fragment too."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import Vocabulary
from langcell.census.layout import categorical, make_var, write_census
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError
from tests.corpus.making import make, read_blocks

N, GENES, BLOCK = 300, 40, 100
BAD = {
    10: "not_integer",
    20: "negative",
    30: "not_finite",
    40: "not_finite",
    50: "empty",
    60: "total",
    70: "misfit",
    80: "misfit",
    85: "misfit",
    90: "no_gene",
}


def facets(n: int) -> dict[str, pa.Array]:
    """The eight facets of n cells of one type."""
    values = {"cell_type": ("B cell", "CL:0000236"), "tissue": ("blood", "UBERON:0000178")}
    names = ["assay", "development_stage", "tissue_general", "disease", "sex", "self_reported_ethnicity"]
    columns = {}
    for name in [*values, *names]:
        label, term = values.get(name, ("unknown", "unknown"))
        columns[name] = categorical([label] * n)
        columns[f"{name}_ontology_term_id"] = categorical([term] * n)
    return columns


def write(path: Path, bad: dict[int, str], genes: list[str] | None = None) -> str:
    """A Census of three datasets of 100 cells, each a fragment of X, with the bad cells `bad`."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.8, (N, GENES)).astype(np.float32)
    dense[:, 0] += 1
    dense[:, GENES - 1] = 0
    totals, promised = dense.sum(axis=1).astype(np.float64), np.count_nonzero(dense, axis=1)
    for i in bad:
        if i == 10:
            dense[i, 0] = 1.5
        elif i == 20:
            dense[i, 0] = -1
        elif i in (30, 40):
            dense[i, 0] = np.nan if i == 30 else np.inf
        elif i == 50:
            dense[i] = 0
            promised[i] = 0
        elif i == 60:
            totals[i] = dense[i].sum() - 1
        elif i in (70, 80):
            promised[i] += 75 - i
        elif i == 85:
            promised[i] = -3
        elif i == 90:
            dense[i] = 0
            dense[i, GENES - 1] = 7
            totals[i], promised[i] = 7, 1
    obs = pa.table(
        {
            "soma_joinid": np.arange(N),
            "dataset_id": categorical([f"study {i // 100}" for i in range(N)]),
            "donor_id": categorical(["donor"] * N),
            "is_primary_data": [True] * N,
            **facets(N),
            "raw_sum": totals,
            "nnz": promised.astype(np.int64),
        }
    )
    genes = genes or [f"ENSG{i:011d}" for i in range(GENES)]
    blocks = (sp.csr_matrix(dense[i : i + BLOCK]) for i in range(0, N, BLOCK))
    write_census(str(path), blocks, obs, make_var(genes, genes))
    return str(path)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All genes but the last."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.json"
    Vocabulary([f"ENSG{i:011d}" for i in range(GENES - 1)]).write(str(path))
    return str(path)


OPTIONS = {"corpus__split_by": "cell", "corpus__test_share": 0.1, "corpus__val_share": 0.0}


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (10, "no whole number: give raw counts"),
        (20, "negative"),
        (30, "NaN or infinite"),
        (40, "NaN or infinite"),
        (50, "no gene has a count"),
        (60, "raw_sum.*below the sum"),
        (70, "obs, var and X do not fit"),
        (80, "obs, var and X do not fit"),
        (85, "obs, var and X do not fit"),
        (90, "none of its genes has both"),
    ],
)
def test_a_bad_cell_is_named_with_dataset_and_joinid(
    ray_session, tmp_path, vocabulary, cell: int, says: str
) -> None:
    uri = write(tmp_path / "census", {cell: BAD[cell]})
    options = OPTIONS | {"tokens__vocabulary": vocabulary}
    with pytest.raises(
        InputError, match=rf"dataset study 0, soma_joinid {cell}: .*{says}(.|\n)*bad_cells skip"
    ):
        make(uri, tmp_path / "corpus", [], **options)
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_bad_cells_are_left_out_of_tokens_and_of_beta(ray_session, tmp_path, vocabulary) -> None:
    options = OPTIONS | {"tokens__vocabulary": vocabulary, "census__bad_cells": "skip"}
    options["corpus__test_share"] = 0.0  # all are train cells
    summary = make(write(tmp_path / "bad", BAD), tmp_path / "corpus", [], **options)
    expected = {fault: list(BAD.values()).count(fault) for fault in BAD.values()}
    assert summary.left_out == expected
    assert summary.cells == N - len(BAD)
    listed = pq.read_table(tmp_path / "corpus" / "skipped.parquet").to_pylist()
    assert listed == [{"soma_joinid": i, "dataset_id": "study 0", "fault": f} for i, f in BAD.items()]
    cells = read_blocks(tmp_path / "corpus")
    assert sorted(set(range(N)) - set(cells)) == list(BAD)
    # The same cells, none of them bad, and those filtered out: the same sentences, and the same medians of
    # all genes but the one outside the vocabulary.
    sound = " and ".join(["is_primary_data == True", *(f"soma_joinid != {i}" for i in BAD)])
    again = make(write(tmp_path / "good", {}), tmp_path / "again", [], **options, census__filter=sound)
    betas = [Beta.read(str(tmp_path / name / "beta.parquet")) for name in ("corpus", "again")]
    np.testing.assert_array_equal(betas[0].beta[:-1], betas[1].beta[:-1])
    np.testing.assert_array_equal(betas[0].n_nonzero[:-1], betas[1].n_nonzero[:-1])
    assert again.cells == summary.cells
    assert read_blocks(tmp_path / "again") == cells


def test_a_gene_that_stands_twice_is_refused_or_left_out(ray_session, tmp_path) -> None:
    genes = [f"ENSG{i:011d}" for i in range(GENES)]
    genes[7] = genes[3]
    uri = write(tmp_path / "census", {}, genes)
    with pytest.raises(InputError, match=rf"feature_id {genes[3]} stands more than once \(1 such\)"):
        make(uri, tmp_path / "corpus", [], **OPTIONS)
    summary = make(uri, tmp_path / "corpus", [], **OPTIONS, census__bad_cells="skip")
    assert summary.genes_left_out == {"duplicated": 1, "without_id": 0}
    vocabulary = Vocabulary.read(str(tmp_path / "corpus" / "vocabulary.json"))
    assert genes[3] not in vocabulary.gene_ids
    assert genes[3] not in Beta.read(str(tmp_path / "corpus" / "beta.parquet")).feature_id
    # nor with medians and tokens of others, which know the gene
    other = [f"ENSG{i:011d}" for i in range(GENES)]
    Vocabulary(other).write(str(tmp_path / "all.json"))
    beta = Beta(other, other, np.ones(GENES, np.int64), np.ones(GENES, np.float32))
    beta.write(str(tmp_path / "all.parquet"))
    given = {"tokens__vocabulary": str(tmp_path / "all.json"), "beta__source": str(tmp_path / "all.parquet")}
    make(uri, tmp_path / "given", [], **OPTIONS, **given, census__bad_cells="skip")
    sentences = [cell[1] for cell in read_blocks(tmp_path / "given").values()]
    assert not any(2 + 3 in tokens for tokens in sentences)
    assert all(len(set(tokens)) == len(tokens) for tokens in sentences)


def test_a_damaged_fragment_is_named_or_left_out(ray_session, tmp_path) -> None:
    uri = write(tmp_path / "census", {})
    fragments = sorted(Path(uri, "census_data/homo_sapiens/ms/RNA/X/raw/__fragments").iterdir())
    assert len(fragments) == N // BLOCK
    data = fragments[1] / "a0.tdb"
    data.write_bytes(data.read_bytes()[:-20])
    nnz_of_block = 2_100
    options = OPTIONS | {"census__slice_nnz": nnz_of_block, "census__attempts": 1}
    with pytest.raises(InputError, match=r"soma_joinid \d+ to \d+ \(dataset study \d.* cannot be read: .+"):
        make(uri, tmp_path / "corpus", [], **options)
    with pytest.raises(
        InputError, match=r"more than census\.most_unreadable allows: this looks like an outage"
    ):
        make(uri, tmp_path / "corpus", [], **options, census__bad_cells="skip")
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    tolerant = options | {"census__bad_cells": "skip", "census__most_unreadable": 0.7}
    summary = make(uri, tmp_path / "corpus", [], **tolerant)
    lost = summary.left_out["unreadable"]
    assert 100 <= lost < N
    assert summary.cells == N - lost
    with pytest.raises(
        InputError, match=r"made with census\.bad_cells skip and lacks \{'unreadable': \d+\} cells"
    ):
        make(uri, tmp_path / "corpus", [], **options)


def test_what_was_mended_is_read_again(ray_session, tmp_path, monkeypatch) -> None:
    uri = write(tmp_path / "census", {})
    fragments = sorted(Path(uri, "census_data/homo_sapiens/ms/RNA/X/raw/__fragments").iterdir())
    data = fragments[1] / "a0.tdb"
    whole = data.read_bytes()
    data.write_bytes(whole[:-20])
    options = OPTIONS | {"census__slice_nnz": 2_100, "census__attempts": 1}
    tolerant = options | {"census__bad_cells": "skip", "census__most_unreadable": 0.7}
    with monkeypatch.context() as patch:  # killed at its very end, without the slices that were lost
        patch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(uri, tmp_path / "corpus", [], **tolerant)
    data.write_bytes(whole)
    mended = make(uri, tmp_path / "corpus", [], **options)
    assert (mended.cells, mended.left_out) == (N, {})
    fresh = make(uri, tmp_path / "fresh", [], **options)
    assert (mended.beta_hash, mended.corpus_hash) == (fresh.beta_hash, fresh.corpus_hash)
    assert read_blocks(tmp_path / "corpus") == read_blocks(tmp_path / "fresh")


def test_a_corpus_without_some_cells_is_another(ray_session, tmp_path, vocabulary) -> None:
    """With medians and vocabulary given, nothing else tells the two apart."""
    genes = [f"ENSG{i:011d}" for i in range(GENES)]
    beta = Beta(genes, genes, np.ones(GENES, np.int64), np.ones(GENES, np.float32))
    beta.write(str(tmp_path / "beta.parquet"))
    given = {"tokens__vocabulary": vocabulary, "beta__source": str(tmp_path / "beta.parquet")}
    options = OPTIONS | given | {"census__bad_cells": "skip"}
    uri = write(tmp_path / "census", {})
    whole = make(uri, tmp_path / "whole", [], **options)
    shutil.rmtree(uri)
    lacking = make(write(tmp_path / "census", {10: BAD[10]}), tmp_path / "lacking", [], **options)
    assert lacking.left_out == {"not_integer": 1}
    assert whole.beta_hash == lacking.beta_hash
    assert whole.corpus_hash != lacking.corpus_hash
