"""A pickle is read as data or not at all."""

from __future__ import annotations

import collections
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from langcell.cells.pickles import read_pickle_dict
from langcell.errors import InputError


class Calls:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_dictionaries_of_numbers_and_text_load(tmp_path: Path, protocol: int) -> None:
    content = {"a": 1, "b": 2.5, "c": "text", "d": -(2**40)}
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert read_pickle_dict(str(path)) == content


@pytest.mark.parametrize(
    "number", [np.float64(0.1), np.float32(2.5), np.int64(-7), np.uint16(9), np.int8(-1)]
)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_numbers_become_plain_ones(tmp_path: Path, number: np.generic, protocol: int) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps({"x": number}, protocol))
    got = read_pickle_dict(str(path))["x"]
    assert got == number.item()
    assert type(got) in (int, float)


def test_big_endian_numbers_keep_their_value(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    number = Calls(np._core.multiarray.scalar, np.dtype(">f8"), struct.pack(">d", 1.5))
    path.write_bytes(pickle.dumps({"x": number}))
    assert read_pickle_dict(str(path)) == {"x": 1.5}


def test_nothing_is_called(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pkl"
    attacks = [
        Calls(os.system, f"touch {trace}"),
        Calls(eval, f"open({str(trace)!r}, 'w')"),
        Calls(open, str(trace), "w"),
        Calls(getattr, {}, "keys"),
        Calls(np.load, str(trace)),
        Calls(collections.OrderedDict),
    ]
    for attack in attacks:
        for content in (attack, [attack], {"gene": attack}):
            path.write_bytes(pickle.dumps(content))
            with pytest.raises(InputError, match="names"):
                read_pickle_dict(str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    "value", [Calls(np.dtype, "O"), np.datetime64("2020-01-01"), np.str_("x"), np.complex128(1), np.bool_(1)]
)
def test_stand_ins_take_numbers_alone(tmp_path: Path, value: object) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps({"x": value}))
    with pytest.raises(InputError, match="no number"):
        read_pickle_dict(str(path))


@pytest.mark.parametrize("content", [[1], "text", {1: 2}, {"a": [1]}, {"a": None}, {"a": {"b": 1}}])
def test_other_content_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=str(path)):
        read_pickle_dict(str(path))


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    whole = pickle.dumps({f"gene {i}": np.float64(i) for i in range(50)})
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError):
            read_pickle_dict(str(path))
    with pytest.raises(InputError, match="No such file"):
        read_pickle_dict(str(tmp_path / "none.pkl"))
