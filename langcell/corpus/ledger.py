"""Cells that cannot be used: refused, or left out, counted and listed.

Tasks find faults and the driver judges them, so that what a task returns does not depend on the policy:
after an `error` the same command with `census.bad_cells=skip` goes on where it stopped. Every cell is
named with its dataset and joinid, in the message (the first ones) or in `skipped.parquet` (all).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from langcell.cells.faults import REASONS, Fault
from langcell.errors import InputError
from langcell.storage import digest

NAME = "skipped.parquet"
NAMED = 5
"""Cells that a message names."""


@dataclass(frozen=True)
class SliceFaults:
    """Cells of a slice that have a fault: soma_joinid (int64, ascending), fault (uint8), and why the slice
    could not be read, where that is the fault."""

    slice: int
    soma_joinid: np.ndarray
    fault: np.ndarray
    reason: str = ""

    @classmethod
    def of(cls, index: int, soma_joinid: np.ndarray, fault: np.ndarray, reason: str) -> SliceFaults:
        """The faults among all cells of a slice."""
        bad = np.flatnonzero(fault)
        return cls(index, soma_joinid[bad], fault[bad], reason)

    @property
    def unreadable(self) -> bool:
        """Whether the slice as a whole could not be read."""
        return bool((self.fault == Fault.UNREADABLE).any())


class Names(Protocol):
    """A source that can name the datasets of cells."""

    def datasets(self, soma_joinid: np.ndarray) -> list[str]: ...


class Ledger:
    """All faults of a corpus. policy: `census.bad_cells`; most_unreadable: cells (count) of slices that
    cannot be read which `skip` may leave out, since an outage of storage must not pass for a corpus."""

    def __init__(self, source: Names, policy: str, most_unreadable: float) -> None:
        self._source, self._policy, self._most_unreadable = source, policy, most_unreadable
        self._faults: dict[int, SliceFaults] = {}

    def add(self, faults: SliceFaults) -> None:
        """Note the faults of a slice (a second time they replace the first).

        Raises InputError that names the cells, where the policy is `error` and there is a fault, or where
        too many slices cannot be read.
        """
        self._faults.pop(faults.slice, None)
        if not len(faults.fault):
            return
        if self.strict:
            raise InputError(self._message(faults))
        self._faults[faults.slice] = faults
        if not faults.unreadable:
            return
        lost = sum(len(other.fault) for other in self._faults.values() if other.unreadable)
        if lost > self._most_unreadable:
            raise InputError(
                f"{self._message(faults)}\n{lost:,} cells cannot be read, more than census.most_unreadable "
                "allows: this looks like an outage. The same command goes on from here."
            )

    @property
    def strict(self) -> bool:
        """Whether any fault is refused."""
        return self._policy == "error"

    @property
    def soma_joinid(self) -> np.ndarray:
        """The cells left out (int64, ascending)."""
        return np.sort(self._column("soma_joinid", np.int64))

    @property
    def digest(self) -> str:
        """Of the cells left out and why: part of what a corpus is."""
        joinid, fault = self._column("soma_joinid", np.int64), self._column("fault", np.uint8)
        order = np.argsort(joinid)
        return digest(joinid[order].tobytes() + fault[order].tobytes())

    @property
    def counts(self) -> dict[str, int]:
        """Cells left out by fault, those that occur."""
        found = Counter(self._column("fault", np.uint8).tolist())
        return {Fault(code).name.lower(): n for code, n in sorted(found.items())}

    def write(self) -> pa.Buffer:
        """skipped.parquet: soma_joinid, dataset_id and fault of every cell left out, by joinid."""
        joinid, fault = self._column("soma_joinid", np.int64), self._column("fault", np.uint8)
        order = np.argsort(joinid)
        names = [fault.name.lower() for fault in Fault]
        table = pa.table(
            {
                "soma_joinid": joinid[order],
                "dataset_id": pa.array(self._source.datasets(joinid[order]), pa.string()),
                "fault": pa.DictionaryArray.from_arrays(fault[order], names),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    def _column(self, name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *(getattr(f, name) for f in self._faults.values())])

    def _message(self, faults: SliceFaults) -> str:
        joinid, remedy = faults.soma_joinid, "--census.bad_cells skip leaves them out and counts them."
        if faults.unreadable:
            ends = np.array([joinid[0], joinid[-1]])
            datasets = " to ".join(dict.fromkeys(self._source.datasets(np.unique(ends))))
            return (
                f"census: the cells with soma_joinid {ends[0]} to {ends[1]} (dataset {datasets}; slice "
                f"{faults.slice}) cannot be read: {faults.reason}. A fragment is damaged, or storage does "
                f"not answer. Mend it and run the same command again, which goes on from here; or {remedy}"
            )
        first = list(zip(joinid[:NAMED], self._source.datasets(joinid[:NAMED]), faults.fault, strict=False))
        lines = [
            f"  dataset {dataset}, soma_joinid {cell}: {REASONS[Fault(f)]}" for cell, dataset, f in first
        ]
        if len(joinid) > NAMED:
            lines.append(f"  and {len(joinid) - NAMED} more of slice {faults.slice}")
        return "census: cells that cannot be used:\n" + "\n".join(lines) + f"\n{remedy}"
