"""The road from the embedded Census to a corpus, against a slow and independent computation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiledbsoma

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import Vocabulary
from langcell.corpus import prepare as prepare_module
from langcell.corpus import roads
from langcell.corpus.manifest import Manifest
from langcell.corpus.prepare import PrepareSummary
from langcell.corpus.schema import BLOCK_SCHEMA, SPLITS
from langcell.corpus.texts import read_texts
from langcell.corpus.token_pass import write_tokens
from langcell.errors import InputError
from langcell.storage import digest
from tests.corpus.making import HELD_OUT, MAX_LENGTH, ROW_GROUP, make, read_blocks


@pytest.fixture(scope="module")
def made(ray_session, demo_uri, tmp_path_factory) -> tuple[Path, PrepareSummary]:
    """A corpus made of one slice."""
    dir = tmp_path_factory.mktemp("one") / "corpus"
    return dir, make(demo_uri, dir)


@pytest.fixture(scope="module")
def sliced(ray_session, demo_uri, tmp_path_factory) -> tuple[Path, PrepareSummary]:
    """The same corpus made of five slices."""
    dir = tmp_path_factory.mktemp("five") / "corpus"
    return dir, make(demo_uri, dir, census__slice_nnz=40_000)


@pytest.fixture(scope="module")
def reference(demo_uri) -> dict[str, np.ndarray]:
    """The embedded Census read by tiledbsoma alone: dense counts, totals, cell types, gene ids."""
    with tiledbsoma.open(f"{demo_uri}/census_data/homo_sapiens") as experiment:
        obs = experiment.obs.read().concat().to_pandas()
        x = experiment.ms["RNA"].X["raw"].read().tables().concat()
        var = experiment.ms["RNA"].var.read().concat()
    counts = np.zeros((len(obs), len(var)))
    counts[x["soma_dim_0"].to_numpy(), x["soma_dim_1"].to_numpy()] = x["soma_data"].to_numpy()
    return {
        "counts": counts,
        "totals": obs["raw_sum"].to_numpy(),
        "types": obs["cell_type_ontology_term_id"].to_numpy().astype(str),
        "genes": np.array(var["feature_id"].to_pylist()),
    }


def test_tokens_of_every_cell_equal_a_plain_computation(made, reference):
    dir, summary = made
    cells = read_blocks(dir)
    assert sorted(cells) == list(range(700))
    normal = reference["counts"] / reference["totals"][:, None] * 1e4
    train = [i for i, cell in cells.items() if cell[0] == "train"]
    # beta: numpy's median over the train cells alone, so that no other cell can have a part in it
    image = normal[train].astype(np.float32)
    medians = np.array([np.median(g[g > 0]) if (g > 0).any() else np.nan for g in image.T])
    beta = Beta.read(str(dir / "beta.parquet"))
    assert beta.feature_id == reference["genes"].tolist()
    np.testing.assert_array_equal(beta.beta, medians.astype(np.float32))
    assert beta.metadata["cells"] == str(len(train))
    assert beta.hash == summary.beta_hash

    genes = reference["genes"][np.isfinite(medians)].tolist()
    vocabulary = Vocabulary.read(str(dir / "vocabulary.json"))
    assert vocabulary.gene_ids == genes
    token_of = np.array([genes.index(g) + 2 if g in genes else 0 for g in reference["genes"]])
    for i, (_, tokens, length, _, term) in cells.items():
        value = normal[i] / beta.beta.astype(np.float64)
        found = np.flatnonzero(value > 0)
        ranked = found[np.argsort(-value[found], kind="stable")]
        assert tokens == [len(genes) + 2, *token_of[ranked]][:MAX_LENGTH], i
        assert length == len(tokens)
        assert term == reference["types"][i]
    assert (summary.genes, summary.cells, summary.left_out) == (len(genes), 700, {})
    assert summary.tokens == sum(cell[2] for cell in cells.values())


def test_the_manifest_tells_the_truth_of_every_file(made):
    dir, summary = made
    manifest = Manifest.read(str(dir))
    cells = read_blocks(dir)
    split_of = {split: sum(cell[0] == split for cell in cells.values()) for split in SPLITS}
    assert manifest.counts["cells"] == summary.splits == split_of
    assert split_of["held_out"] == 129
    assert all(split_of.values())
    for block in manifest.blocks:
        data = (dir / block.file).read_bytes()
        assert (digest(data), len(data)) == (block.hash, block.bytes)
        parquet = pq.ParquetFile(dir / block.file)
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        assert groups == block.row_groups
        assert max(groups) <= ROW_GROUP
        table = parquet.read()
        assert table.schema.equals(BLOCK_SCHEMA)
        assert pc.sum(table["length"]).as_py() == block.tokens
    for file in manifest.files:
        assert digest((dir / file.file).read_bytes()) == file.hash
    held_out_terms = {cell[4] for cell in cells.values() if cell[0] == "held_out"}
    assert held_out_terms == set(HELD_OUT)
    assert manifest.coverage["cells"] == 700
    on_disk = {str(p.relative_to(dir)) for p in dir.rglob("*") if p.is_file()}
    assert on_disk == {"manifest.json", *(f.file for f in [*manifest.files, *manifest.blocks])}


def test_texts_count_their_cells(made):
    dir, summary = made
    texts, cells = read_texts(str(dir)), read_blocks(dir)
    assert len(texts) == summary.texts
    for k, text_id in enumerate(texts.text_id):
        own = [cell for cell in cells.values() if cell[3] == text_id]
        assert texts.cells[k].tolist() == [sum(cell[0] == split for cell in own) for split in SPLITS]
        assert {cell[4] for cell in own} == {texts.term[k]}
    held_out = texts.cells[:, SPLITS.index("held_out")] > 0
    assert not texts.cells[held_out, SPLITS.index("train")].any()


def test_slicing_changes_no_cell_and_no_bit_of_beta(made, sliced):
    one, five = made[1], sliced[1]
    assert (one.slices, five.slices) == (1, 5)
    assert five.beta_hash == one.beta_hash
    assert read_blocks(sliced[0]) == read_blocks(made[0])
    assert (made[0] / "texts.parquet").read_bytes() == (sliced[0] / "texts.parquet").read_bytes()
    # the order of an epoch depends on the row groups, so the two are not the same corpus
    assert five.corpus_hash != one.corpus_hash


def test_cells_that_are_not_trained_on_have_no_part_in_beta(made, demo_uri, tmp_path):
    without = f"is_primary_data == True and cell_type_ontology_term_id != '{HELD_OUT[0]}'"
    summary = make(demo_uri, tmp_path, [], census__filter=without)
    assert summary.splits == {**made[1].splits, "held_out": 0}
    assert summary.beta_hash == made[1].beta_hash
    kept = {i: cell for i, cell in read_blocks(made[0]).items() if cell[0] != "held_out"}
    assert read_blocks(tmp_path) == kept


def test_a_whole_corpus_is_not_made_again(made, demo_uri):
    dir, summary = made
    before = {p: p.stat().st_mtime_ns for p in dir.rglob("*")}
    again = make(demo_uri, dir)
    assert again == replace(summary, skipped=1, seconds=again.seconds)
    assert {p: p.stat().st_mtime_ns for p in dir.rglob("*")} == before


def test_an_interrupted_corpus_goes_on_where_it_stopped(sliced, demo_uri, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(demo_uri, tmp_path, census__slice_nnz=40_000)
    with pytest.raises(InputError, match=r"no whole corpus"):
        Manifest.read(str(tmp_path))
    with pytest.raises(InputError, match=r"(?s)another corpus.*tokens\.max_length: 200 there, 100 asked"):
        make(demo_uri, tmp_path, census__slice_nnz=40_000, tokens__max_length=100)
    # Slice 3 was cut off before its report, and left rubbish behind.
    (tmp_path / "unfinished/slice-000003.json").unlink()
    (tmp_path / "blocks/train/slice-000003.parquet").write_bytes(b"half")
    (tmp_path / "blocks/train/slice-000003.parquet.0123.tmp").write_bytes(b"half")
    monkeypatch.setattr(roads, "train_beta", None)  # read back, not computed
    written = []
    monkeypatch.setattr(
        prepare_module,
        "write_tokens",
        lambda source, *rest: (
            written.extend(part.index for part in source.slices) or write_tokens(source, *rest)
        ),
    )
    summary = make(demo_uri, tmp_path, census__slice_nnz=40_000)
    assert written == [3]
    assert summary.skipped == 4
    assert Manifest.read(str(tmp_path)) == Manifest.read(str(sliced[0]))
    assert {p.name for p in tmp_path.rglob("*.tmp")} == set()
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"census__filter": "sex == 'unknown'"}, r"census\.filter: 'is_primary_data == True' there"),
        ({"corpus__split_seed": 1}, r"corpus\.split_seed: 0 there, 1 asked for"),
        ({"held_out": []}, r"eval\.held_out_types: \['CL:0001054'\] there, \[\] asked for"),
        ({"text__define": ["cell_type"]}, r"text\.define"),
        ({"beta__source": "BETA"}, r"beta: 'of the train split' there, '[0-9a-f]{32}' asked for"),
    ],
)
def test_another_corpus_is_refused_by_name(made, demo_uri, changes, message):
    dir = made[0]
    changes = {k: str(dir / "beta.parquet") if v == "BETA" else v for k, v in changes.items()}
    with pytest.raises(InputError, match=message):
        make(demo_uri, dir, **changes)


def test_a_truncated_block_is_refused(made, demo_uri, tmp_path):
    dir = shutil.copytree(made[0], tmp_path / "copy")
    path = dir / Manifest.read(str(dir)).blocks[0].file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="is damaged"):
        make(demo_uri, dir)


def test_medians_and_tokens_of_others_leave_out_what_they_do_not_know(made, demo_uri, tmp_path, reference):
    dir = made[0]
    medians = str(dir / "beta.parquet")
    few = Vocabulary(reference["genes"][:3].tolist())
    few.write(str(tmp_path / "few.json"))
    given = {"beta__source": medians, "tokens__vocabulary": str(tmp_path / "few.json")}
    has = (reference["counts"][:, :3] > 0).any(axis=1)
    first = np.flatnonzero(~has)[0]
    says = rf"dataset 10x_pbmc68k_reduced, soma_joinid {first}: none of its genes has both"
    with pytest.raises(InputError, match=says):
        make(demo_uri, tmp_path / "c", **given)
    summary = make(demo_uri, tmp_path / "c", **given, census__bad_cells="skip")
    assert summary.skipped == 1  # the slice was whole: only what to make of it has changed
    assert 0 < summary.cells == has.sum() < 700
    assert summary.left_out == {"no_gene": 700 - has.sum()}
    listed = pq.read_table(tmp_path / "c" / "skipped.parquet")
    assert listed["soma_joinid"].to_pylist() == np.flatnonzero(~has).tolist()
    assert set(listed["dataset_id"].to_pylist()) == {"10x_pbmc68k_reduced"}
    assert set(listed["fault"].to_pylist()) == {"no_gene"}
    assert (summary.genes, summary.beta_hash) == (3, made[1].beta_hash)
    assert sorted(read_blocks(tmp_path / "c")) == np.flatnonzero(has).tolist()
    assert read_texts(str(tmp_path / "c")).cells.sum() == has.sum()
    Vocabulary(["ENSG_OF_NO_CENSUS"]).write(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="None of the 765 genes"):
        make(demo_uri, tmp_path / "d", tokens__vocabulary=str(tmp_path / "none.json"), beta__source=medians)


def test_mistakes_are_told_before_a_count_is_read(ray_session, demo_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(roads, "train_beta", None)
    for changes, message in [
        ({"held_out": ["monocyte of Mars"]}, "held_out_types"),
        ({"tokens__max_length": 1}, r"tokens\.max_length"),
        ({"corpus__row_group_cells": 0}, r"corpus\.row_group_cells"),
        ({"corpus__test_share": 2.0}, r"corpus\.test_share"),
        ({"census__filter": "tissue == 'moon'"}, "matches no cell"),
        ({"beta__source": str(tmp_path / "nowhere.parquet")}, "nowhere"),
    ]:
        with pytest.raises(InputError, match=message):
            make(demo_uri, tmp_path / "corpus", **changes)
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make(demo_uri, tmp_path / "file")
