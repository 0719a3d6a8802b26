"""Where the cells are, told by what stands there: the embedded Census, a release, or a folder of files."""

from __future__ import annotations

from pathlib import Path

from langcell.census.experiment import Census
from langcell.census.h5ad import H5adFolder
from langcell.census.opening import resolve
from langcell.census.options import CensusOptions
from langcell.census.slices import Source
from langcell.census.tokenised import TokenisedFolder


def open_source(options: CensusOptions) -> Source | TokenisedFolder:
    """The cells that the options name, open for reading on the driver.

    A local folder with .h5ad files is a corpus of such files, one that Hugging Face `datasets` wrote (or
    that holds .parquet files) one of token sentences; everything else is a SOMA collection. Raises
    InputError where there is none of them, and for a filter that matches no cell or another number of
    cells than `census.expected_cells`.
    """
    options = resolve(options)
    folder = Path(options.uri) if options.uri and "://" not in options.uri else None
    if folder and any(folder.glob("*.h5ad")):
        return H5adFolder.open(options)
    if folder and TokenisedFolder.stands_at(folder):
        return TokenisedFolder.open(options)
    return Census.open(options)
