"""Dictionaries out of pickles that others made, without running what a pickle can run.

Geneformer publishes its token and median dictionaries as pickles, and loading a pickle may call
anything. This reader resolves two names, those that a NumPy number needs, to stand-ins of its own, and
refuses every other: no code outside this module is reached, NumPy's own constructors included.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from langcell.errors import InputError


def is_pickle(path: str) -> bool:
    """Whether the name is a pickle's."""
    return path.endswith((".pkl", ".pickle"))


def read_pickle_dict(path: str) -> dict[str, Any]:
    """A dictionary from text to text or numbers, from the pickle file `path`.

    Raises InputError for a file that is missing or damaged, holds another thing, or names anything but
    NumPy's numbers.
    """
    try:
        with open(path, "rb") as file:
            content = _Reader(file).load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise InputError(f"{path} cannot be read as a pickled dictionary: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise InputError(f"{path} holds {key!r}: {value!r}; text to text or numbers is expected")
    return content


class _Dtype:
    """Stands for `numpy.dtype` of a number while a pickle is read."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in {"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
            raise pickle.UnpicklingError(f"NumPy type {code!r} is no number")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _Dtype, data: bytes) -> int | float:
    """Stands for NumPy's constructor of a pickled number."""
    return np.frombuffer(data, dtype.order + dtype.code, count=1)[0].item()


_ALLOWED = {
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a dictionary does not need")
        return _ALLOWED[module, name]
