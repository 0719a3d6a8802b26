"""Two hundred thousand cells of a file: their counts are held by the chunk, their answers once."""

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

CELLS, ENTRIES, WIDTH = 200_000, 40, 256
ANSWERS_MIB = CELLS * WIDTH * 4 / 2**20
"""The embeddings, which stand in obsm afterwards."""
PEAK = """
import resource, sys
import anndata
import langcell
from langcell.inference.annotate import counts_of
from langcell.inference.pretrained import Pretrained

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB

adata = anndata.read_h5ad(sys.argv[1], backed="r")
model = Pretrained.from_pretrained(sys.argv[2])
"""
READ = """
peaks, cells, tokens = [], 0, 0
for first, sentences in counts_of(adata, model).chunks():
    assert first == cells
    cells += len(sentences)
    tokens += len(sentences.tokens_T)
    peaks.append(peak())
print(cells, tokens, peaks[1], peaks[-1])
"""
ANNOTATE = """
asked = {"candidates": ["B cell", "natural killer cell"], "a": 1.0, "progress": False, "chunk": 4096}
langcell.annotate(adata[:8192].to_memory(), model, **asked)
early = peak()
langcell.annotate(adata, model, **asked)
label = adata.obs["langcell_label"]
print(len(label), int(label.notna().sum()), early, peak())
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def big(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .h5ad file of the export's genes, 40 counts a cell: 64 MB of them."""
    genes = Pretrained.from_pretrained(export).vocabulary.gene_ids
    rng, step = np.random.default_rng(0), len(genes) // ENTRIES
    path = tmp_path_factory.mktemp("many") / "big.h5ad"
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
    return path


def in_a_process(what: str, big: Path, export: Path) -> list[int]:
    """The four numbers that it prints, the last two of them peaks of its memory, early and late (MiB)."""
    command = [sys.executable, "-c", PEAK + what, str(big), str(export)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()[-4:]]


def test_counts_are_held_by_the_chunk(big: Path, export: Path) -> None:
    """After two chunks of 49 the peak of the process hardly grows."""
    cells, tokens, early, late = in_a_process(READ, big, export)
    assert (cells, tokens) == (CELLS, CELLS * (ENTRIES + 1))
    assert late - early < 25, (early, late)


def test_answers_are_held_once(big: Path, export: Path) -> None:
    """After 8,192 cells the peak grows by the embeddings and little more; a second copy of them, or the
    counts of the whole file, would show."""
    assert Pretrained.from_pretrained(export).model.cell_proj.out_features == WIDTH
    cells, named, early, late = in_a_process(ANNOTATE, big, export)
    assert cells == named == CELLS
    assert late - early < 1.2 * ANSWERS_MIB, (early, late)
