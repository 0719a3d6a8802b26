"""Folders that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from langcell.files import whole_folder


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "model"
    with whole_folder(place) as folder:
        folder.mkdir()
        (folder / "one").touch()
        assert not place.exists()
    with pytest.raises(RuntimeError), whole_folder(place) as folder:  # noqa: PT012
        folder.mkdir()
        (folder / "two").touch()
        raise RuntimeError
    assert [path.name for path in place.iterdir()] == ["one"]
    backup, killed = place.with_name("model.old"), place.with_name(".model.old")
    for left in (backup, killed):  # somebody's, and of a process that was killed before it was done
        left.mkdir()
        (left / "nought").touch()
    with whole_folder(place) as folder:
        folder.mkdir()
        (folder / "two").touch()
    assert [path.name for path in place.iterdir()] == ["two"]
    assert {path.name for path in place.parent.iterdir()} == {"model", "model.old"}
    assert [path.name for path in backup.iterdir()] == ["nought"]
