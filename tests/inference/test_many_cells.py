"""Two hundred thousand cells of a file are annotated in the memory of their answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.io import write_elem

from langcell.inference.pretrained import Pretrained

CELLS, ENTRIES = 200_000, 40
WIDTH = 256
ANSWERS_MB = CELLS * WIDTH * 4 / 2**20
"""The embeddings, which stand in obsm afterwards."""
ANNOTATE = """
import resource, sys
import anndata
import langcell

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

data, model = sys.argv[1:]
adata = anndata.read_h5ad(data, backed="r")
asked = {"candidates": ["B cell", "natural killer cell"], "a": 1.0, "progress": False, "chunk": 4096}
langcell.annotate(adata[:8192].to_memory(), model, **asked)
early = peak()
langcell.annotate(adata, model, **asked)
label = adata.obs["langcell_label"]
print(len(label), int(label.notna().sum()), early, peak())
"""


@pytest.mark.slow
def test_memory_is_that_of_the_answers(export: Path, tmp_path: Path) -> None:
    """64 MB of counts, read from the disk: after 8,192 cells the peak of the process grows by the 195 MB of
    the embeddings and little more; a second copy of them would show."""
    model = Pretrained.from_pretrained(export)
    assert model.model.cell_proj.out_features == WIDTH
    genes = model.vocabulary.gene_ids
    rng, step = np.random.default_rng(0), len(genes) // ENTRIES
    path = tmp_path / "big.h5ad"
    with h5py.File(path, "w") as file:
        write_elem(file, "obs", pd.DataFrame(index=[f"c{i}" for i in range(CELLS)]))
        write_elem(file, "var", pd.DataFrame(index=genes))
        x = file.create_group("X")
        shape = (CELLS, len(genes))
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        x["indptr"] = np.arange(CELLS + 1, dtype=np.int64) * ENTRIES
        x["data"] = rng.integers(1, 6, CELLS * ENTRIES).astype(np.float32)
        columns = np.arange(ENTRIES) * step + rng.integers(0, step, (CELLS, ENTRIES))
        x["indices"] = columns.ravel().astype(np.int32)
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    done = subprocess.run(
        [sys.executable, "-c", ANNOTATE, str(path), str(export)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    cells, named, early, late = map(int, done.stdout.split()[-4:])
    assert cells == named == CELLS
    assert late - early < 1.4 * ANSWERS_MB, (early, late)
