"""What storage is asked for a corpus: the work of a check must not grow with its files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from langcell.corpus.manifest import Block, Manifest, count_blocks
from langcell.errors import InputError
from langcell.storage import digest, open_root, sizes, write_file
from tests.s3server import ENVIRONMENT, Fault, S3Server, s3_server

BLOCKS = 60


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A bucket `corpora`, which is empty."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server.client.create_bucket(Bucket="corpora")
        yield server


def test_sizes_are_those_of_the_files_wherever_they_stand(tmp_path) -> None:
    root = open_root(str(tmp_path))
    root.create_dir("blocks/train")
    for size, name in enumerate(("a", "blocks/train/b", "blocks/train/c", "d")):
        write_file(root, name, bytes(size))
    names = [
        "blocks/train/c",
        "blocks",
        "none",
        "d",
        "blocks/train/b",
        "blocks/train/no",
        "other/x",
        "other/y",
    ]
    assert sizes(root, names) == [2, None, None, 3, 1, None, None, None]
    assert sizes(root, ["d"]) == [3]
    assert sizes(root, ["blocks/train"]) == sizes(root, ["none"]) == [None]
    assert sizes(root, []) == []


def test_a_corpus_in_a_bucket_is_checked_by_a_listing_a_folder(server: S3Server) -> None:
    blocks = []
    for i in range(BLOCKS):
        split, data = ("train", "val")[i % 2], bytes(i)
        name = f"blocks/{split}/slice-{i:06d}.parquet"
        server.put("corpora", f"many/{name}", data)
        blocks.append(Block(name, i, digest(data), split, 1, [1], i))
    uri = server.uri("corpora/many")
    manifest = Manifest("c", {}, "r", "b", "v", {}, count_blocks(blocks), {}, blocks, [], {})
    manifest.write(open_root(uri))
    with server.fault(Fault()) as requests:
        assert Manifest.read(uri) == manifest
        assert requests() <= 4  # the manifest's size and content, and two folders
    server.put("corpora", f"many/{blocks[7].file}", b"")
    with pytest.raises(InputError, match=rf"{blocks[7].file} \(0 bytes instead of 7\)"):
        Manifest.read(uri)
    with (
        server.fault(Fault(methods=("GET",), path="^/corpora/?$", status=403)),
        pytest.raises(InputError, match="cannot be listed"),
    ):
        Manifest.read(uri)
