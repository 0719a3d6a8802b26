"""Local files and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under another name, then move it into place (an existing one is replaced).

    Where that fails, nothing new is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """Where to write a folder (a name that nothing has), which is then moved into place; an existing one is
    replaced.

    Where the block fails, nothing new is left. Raises whatever the block does.
    """
    # Hidden names, for `model.old` may be a backup of somebody's.
    temporary, old = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed below
        os.replace(directory, old)
    os.replace(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)
