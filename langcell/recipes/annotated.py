"""Annotations on disk: an .h5ad file that is whole or absent, filled as calls arrive.

Embeddings are the bulk (1 KB a cell), so they are written row range by row range and never held together;
columns of obs (some 40 bytes a cell) are. A file that was given is copied, counts and all, and gets new
columns; of a Census query the file has obs and embeddings alone.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from langcell.inference.annotate import COLUMNS, EMBEDDING, Calls

ROWS = 65_536
"""Rows of the embedding that are looked up at a time for the figure."""


class AnnotatedFile:
    """Calls of N cells, in any order of row ranges; a context that leaves the file only if it ends well.

    path: the file to be; source: the .h5ad file that is copied, or obs of cells that have none.
    """

    def __init__(self, path: Path, source: Path | pd.DataFrame, width: int) -> None:
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata has several to give on the age of a layout
            if isinstance(source, Path):
                shutil.copyfile(source, self._temporary)
            else:
                anndata.AnnData(obs=source).write_h5ad(self._temporary)
            self._file = h5py.File(self._temporary, "r+")
            self.obs: pd.DataFrame = read_elem(self._file["obs"])
        self.n = len(self.obs)
        if "obsm" not in self._file:
            write_elem(self._file, "obsm", {})
        obsm = self._file["obsm"]
        if EMBEDDING in obsm:
            del obsm[EMBEDDING]
        write_elem(
            obsm, EMBEDDING, np.empty((0, width), np.float32), dataset_kwargs={"maxshape": (None, width)}
        )
        self._z = obsm[EMBEDDING]
        self._z.resize((self.n, width))
        self._columns: dict[str, np.ndarray] = {}
        self._seen = np.zeros(self.n, bool)

    def put(self, row: int, calls: Calls) -> None:
        """The calls of the rows from `row` on. Raises RuntimeError for a row that has its call already."""
        where = slice(row, row + len(calls.label))
        if self._seen[where].any():
            raise RuntimeError(f"rows from {row} on were annotated twice")
        self._seen[where] = True
        self._z[where] = calls.z_NP
        for name in Calls.__annotations__:
            if name != "z_NP":
                values = getattr(calls, name)
                column = self._columns.setdefault(name, np.empty(self.n, values.dtype))
                column[where] = values

    @property
    def calls(self) -> Calls:
        """All calls, without embeddings. Raises RuntimeError where some are missing."""
        if not self._seen.all():
            raise RuntimeError(f"{(~self._seen).sum()} of {self.n} cells were not annotated")
        return Calls(**self._columns, z_NP=np.empty((self.n, 0), np.float32))

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of some rows (ascending)."""
        parts = [self._z[0:0]]
        for start in range(0, self.n, ROWS):
            inside = rows[(rows >= start) & (rows < start + ROWS)] - start
            if len(inside):
                parts.append(self._z[start : start + ROWS][inside])
        return np.concatenate(parts)

    def finish(self, columns: pd.DataFrame, key: str, how: Mapping[str, Any]) -> None:
        """Write the columns of obs, and how they were made into uns[key]."""
        table = columns.set_index(self.obs.index)
        written = [*table, *(f"{key}_{name}" for name in COLUMNS)]  # an earlier annotation's too
        kept = self.obs.drop(columns=[name for name in written if name in self.obs])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A file whose obs has such columns was written so by somebody: it is written so again.
            with anndata.settings.override(allow_write_nullable_strings=True):
                write_elem(self._file, "obs", pd.concat([kept, table], axis=1))
            if "uns" not in self._file:
                write_elem(self._file, "uns", {})
            write_elem(self._file["uns"], key, dict(how))

    def __enter__(self) -> AnnotatedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)
