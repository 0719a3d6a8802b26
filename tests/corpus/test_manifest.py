import json
import os

import pyarrow.fs as fs
import pytest

from langcell.corpus.manifest import (
    Block,
    File,
    Manifest,
    corpus_hash,
    count_blocks,
    differences,
    library_versions,
    refuse_other,
)
from langcell.errors import InputError
from langcell.storage import digest, open_root, read_file, write_file

RECIPE = {"census": {"filter": "is_primary_data == True", "version": "2025-11-08"}, "beta": "train split"}


def store(root: fs.FileSystem) -> Manifest:
    """A small corpus of random bytes with a manifest that is true of it."""
    blocks, files = [], []
    for split, rows in (("train", [4, 4, 2]), ("val", [1])):
        data = os.urandom(100 * sum(rows))
        name = f"blocks/{split}/slice-000000.parquet"
        root.create_dir(f"blocks/{split}", recursive=True)
        write_file(root, name, data)
        blocks.append(Block(name, len(data), digest(data), split, sum(rows), rows, 7 * sum(rows)))
    write_file(root, "texts.parquet", b"texts")
    files.append(File("texts.parquet", 5, digest(b"texts")))
    manifest = Manifest(
        hash="c", recipe=RECIPE, recipe_hash="r", beta_hash="b", vocabulary_hash="v",
        ontologies={"CL": "2025-10-01"}, counts={**count_blocks(blocks), "texts": 3, "genes": 5},
        coverage={"cell_type": {"defined": 3}}, blocks=blocks, files=files, versions=library_versions(),
    )  # fmt: skip
    manifest.write(root)
    return manifest


def test_a_manifest_reads_back_and_counts_its_blocks(tmp_path):
    manifest = store(open_root(str(tmp_path)))
    assert Manifest.exists(str(tmp_path))
    assert not Manifest.exists(str(tmp_path / "other"))
    back = Manifest.read(str(tmp_path))
    assert back == manifest
    assert back.cells == 11
    assert back.counts["cells"] == {"train": 10, "val": 1, "test": 0, "held_out": 0}
    assert back.counts["tokens"]["train"] == 70
    assert [b.row_groups for b in back.split("train")] == [[4, 4, 2]]
    assert back.versions["langcell"]
    assert back.versions["ray"]


def test_a_corpus_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        Manifest.read(str(tmp_path))
    root = open_root(str(tmp_path))
    block = store(root).blocks[0]
    path = tmp_path / block.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{block.file} \(999 bytes instead of 1000\)"):
        Manifest.read(str(tmp_path))
    path.unlink()
    (tmp_path / "texts.parquet").unlink()
    with pytest.raises(InputError, match=rf"texts.parquet \(missing\), {block.file} \(missing\)"):
        Manifest.read(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        Manifest.read(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="corpus format 99"):
        Manifest.read(str(tmp_path))


def test_another_recipe_is_named_field_by_field():
    refuse_other(RECIPE, json.loads(json.dumps(RECIPE)), "c")
    asked = {
        "census": {**RECIPE["census"], "filter": "sex == 'female'"},
        "beta": "0123",
        "tokens": {"max": 1},
    }
    assert differences(RECIPE, asked) == [
        "beta: 'train split' there, '0123' asked for",
        "census.filter: 'is_primary_data == True' there, \"sex == 'female'\" asked for",
        "tokens: None there, {'max': 1} asked for",
    ]
    with pytest.raises(InputError, match=r"(?s)census\.filter.*choose another --corpus.dir"):
        refuse_other(RECIPE, asked, "runs/corpus")


def test_the_corpus_hash_depends_on_each_part_and_not_on_the_order_of_keys():
    parts = [RECIPE, "selection", "left out", "beta", "vocabulary"]
    assert corpus_hash(*parts) == corpus_hash(dict(reversed(RECIPE.items())), *parts[1:])
    changed = [corpus_hash(*parts[:i], {"x": 1} if i == 0 else "other", *parts[i + 1 :]) for i in range(5)]
    assert len({corpus_hash(*parts), *changed}) == 6


def test_files_are_written_whole_under_relative_names_on_any_filesystem(tmp_path):
    for uri in (str(tmp_path / "a"), (tmp_path / "b").as_uri()):
        root = open_root(uri)
        root.create_dir("blocks/train", recursive=True)
        write_file(root, "blocks/train/x.parquet", b"one")
        write_file(root, "blocks/train/x.parquet", b"two")
        assert read_file(root, "blocks/train/x.parquet") == b"two"
    assert (tmp_path / "b/blocks/train/x.parquet").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "b/blocks/train").iterdir()] == ["x.parquet"]
    with pytest.raises(InputError, match="cannot be opened"):
        open_root("nowhere://bucket/corpus")
