"""beta: the non-zero median of each gene, as an artefact: what a corpus was normalised by travels with it.

Made from a corpus by `langcell.cells.medians`, or published ones are taken. Own medians are float32 (1e-7
from a median in float64). Published ones keep the precision that they were published in: Geneformer's as
float32 would change the sentences of 11 of 3,874 real cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from langcell.cells.pickles import is_pickle, read_pickle_dict
from langcell.errors import InputError


@dataclass(frozen=True, eq=False)
class Beta:
    """The artefact: what the normalised counts of a gene are divided by, in this and any later use.

    feature_id, feature_name: genes in the order of var; n_nonzero: int64 [genes], cells with the gene;
    beta: [genes], counts per ten thousand, NaN for a gene in no cell, float32 (float64 where published
    so); metadata: where it is from.
    """

    feature_id: list[str]
    feature_name: list[str]
    n_nonzero: np.ndarray
    beta: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hex digest of the content: gene ids, n_nonzero and the bits of beta."""
        digest = blake2b("\n".join(self.feature_id).encode(), digest_size=16)
        digest.update(self.n_nonzero.astype("<i8").tobytes())
        one_nan = np.where(np.isnan(self.beta), self.beta.dtype.type(np.nan), self.beta)
        digest.update(one_nan.astype(self.beta.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def without(self, genes: Iterable[str], metadata: Mapping[str, str]) -> Beta:
        """The same but for some genes (ids), with more metadata."""
        left_out = set(genes)
        kept = [i for i, gene in enumerate(self.feature_id) if gene not in left_out]
        return Beta(
            [self.feature_id[i] for i in kept],
            [self.feature_name[i] for i in kept],
            self.n_nonzero[kept],
            self.beta[kept],
            {**self.metadata, **metadata},
        )

    def write(self, path: str, filesystem: fs.FileSystem | None = None) -> None:
        """Writes Parquet: feature_id, feature_name, n_nonzero, beta; hash and metadata in the schema."""
        table = pa.table(
            {
                "feature_id": self.feature_id,
                "feature_name": self.feature_name,
                "n_nonzero": self.n_nonzero,
                "beta": self.beta,
            }
        )
        about = json.dumps({"hash": self.hash, "metadata": self.metadata}, sort_keys=True)
        pq.write_table(table.replace_schema_metadata({"langcell": about}), path, filesystem=filesystem)

    @classmethod
    def read(cls, path: str, filesystem: fs.FileSystem | None = None) -> Beta:
        """Reads what `write` wrote. Raises InputError if it is something else, or damaged."""
        try:
            table = pq.read_table(path, filesystem=filesystem)
            about = json.loads(table.schema.metadata[b"langcell"])
            beta = cls(
                table["feature_id"].to_pylist(),
                table["feature_name"].to_pylist(),
                table["n_nonzero"].to_numpy(),
                table["beta"].to_numpy(),
                about["metadata"],
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise InputError(f"beta: {path} is not a beta.parquet of langcell ({error!r})") from error
        if beta.hash != about["hash"]:
            raise InputError(f"beta: {path} is damaged: its content does not give its hash {about['hash']}")
        return beta

    @classmethod
    def from_geneformer(cls, pickle_path: str) -> Beta:
        """Geneformer's published medians (gene id -> median), read by a restricted reader.

        They say nothing of how many cells had a gene: n_nonzero is 0.
        """
        medians = read_pickle_dict(pickle_path)
        beta = np.array(list(medians.values()))
        if not len(beta) or beta.dtype != np.float64 or not (np.isfinite(beta) & (beta > 0)).all():
            raise InputError(f"{pickle_path}: a dictionary from gene ids to positive medians is expected")
        nothing = np.zeros(len(medians), np.int64)
        about = {"method": "median dictionary of Geneformer"}
        return cls(list(medians), [""] * len(medians), nothing, beta, about)

    @classmethod
    def load(cls, source: str) -> Beta:
        """`beta.source`: a beta.parquet (path or URI), or Geneformer's dictionary (.pkl)."""
        return cls.from_geneformer(source) if is_pickle(source) else cls.read(source)
