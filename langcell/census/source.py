"""Where the cells are, told by what stands there: the embedded Census, a release, or a folder of files."""

from __future__ import annotations

from pathlib import Path

from langcell.census.experiment import Census
from langcell.census.h5ad import H5adFolder
from langcell.census.opening import resolve
from langcell.census.options import CensusOptions
from langcell.census.slices import Source
from langcell.census.tokenised import TokenisedFolder
from langcell.errors import InputError


def open_source(options: CensusOptions) -> Source | TokenisedFolder:
    """The cells that the options name, open for reading on the driver.

    A local folder with .h5ad files is a corpus of such files, one that Hugging Face `datasets` wrote (or
    that holds .parquet files) one of token sentences; everything else is a SOMA collection. Raises
    InputError where there is none of them, for a filter that matches no cell, and for a map or table that
    the kind of source has no use for.
    """
    options = resolve(options)
    local = options.uri is not None and options.uri != "demo" and "://" not in options.uri
    folder = Path(options.uri) if local and options.uri else None
    if folder and any(folder.glob("*.h5ad")):
        return H5adFolder.open(options)
    if options.symbols:
        raise InputError(
            "census.symbols: gene symbols are mapped for .h5ad files alone; this source has none."
        )
    if folder and TokenisedFolder.stands_at(folder):
        return TokenisedFolder.open(options)
    if options.obs_map:
        raise InputError("census.obs_map: a Census speaks its own words; a map is for .h5ad and token files.")
    return Census.open(options)
