"""Where a corpus or a run lies: any pyarrow filesystem, every file whole or absent.

A folder becomes a `SubTreeFileSystem`, so that who reads or writes it knows only names relative to it
("manifest.json"), and a local folder and s3://bucket/corpus take the same road. A file is written
beside its place, under a name of its own, and then moved: a reader never sees half of one, and what a
worker that died leaves behind ends in `.tmp`. (On S3 a PUT is atomic by itself, but a stream that is left
by an exception publishes what it has got so far: there, too, only under the other name.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import uuid
from collections import Counter
from typing import Any

import pyarrow as pa
from pyarrow import fs

from langcell.errors import InputError, refuse_secrets

HALF = ".tmp"
"""How the name of a file ends that is not whole."""


def absolute(uri: str) -> str:
    """The folder `uri` by a name that holds in every process: workers have other working folders."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def open_root(uri: str, option: str = "corpus.dir") -> fs.FileSystem:
    """The filesystem whose root is the folder `uri`: a local path or any URI that pyarrow knows.

    option: that a message names. Nothing is created. Raises InputError for a URI that pyarrow cannot open, or
    with credentials in it.
    """
    refuse_secrets(option, uri)
    if "://" not in uri:
        return fs.SubTreeFileSystem(absolute(uri), fs.LocalFileSystem())
    try:
        base, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{option}: {uri!r} cannot be opened: {error}") from error
    return fs.SubTreeFileSystem(path, base)


def write_file(root: fs.FileSystem, name: str, data: bytes | pa.Buffer) -> None:
    """Write `data` as `name`, atomically (an existing file is replaced). Its folder must exist."""
    temporary = f"{name}.{uuid.uuid4().hex}{HALF}"
    try:
        with root.open_output_stream(temporary) as stream:
            stream.write(data)
        root.move(temporary, name)
    except OSError:
        with contextlib.suppress(OSError):
            root.delete_file(temporary)  # on a disk that is full it would take room for good
        raise


def remove_halves(root: fs.FileSystem, folder: str) -> None:
    """Remove what writers that died have left in `folder` (not below it); other writers' work fails there."""
    for info in root.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if info.path.endswith(HALF):
            with contextlib.suppress(FileNotFoundError):
                root.delete_file(info.path)


def read_file(root: fs.FileSystem, name: str) -> bytes:
    """All bytes of `name`. Raises FileNotFoundError if there is none."""
    with root.open_input_stream(name) as stream:
        return stream.read()


def sizes(root: fs.FileSystem, names: list[str]) -> list[int | None]:
    """Bytes of each file, None for one that does not exist.

    Of several in one folder the folder is listed, a request for a thousand files on S3: a large corpus has
    tens of thousands, each a request if it is asked for by name.
    """
    in_folder = Counter(map(posixpath.dirname, names))
    found = root.get_file_info([name for name in names if in_folder[posixpath.dirname(name)] == 1])
    for folder, n_names in in_folder.items():
        if n_names > 1:
            found += root.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    size_of = {info.path: info.size for info in found if info.type == fs.FileType.File}
    return [size_of.get(name) for name in names]


def digest(data: bytes | pa.Buffer) -> str:
    """blake2b of 16 bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_json(value: Any) -> str:
    """`digest` of a JSON value, independent of the order of its keys."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
