"""Where cells come from: the options of the census room (standard library only)."""

from dataclasses import dataclass


@dataclass
class CensusOptions:
    """Which cells are read."""

    uri: str | None = None
    """URI of a SOMA collection with the Census layout (a local folder, s3://...). None: the public release `version`. `demo`: the embedded mini Census, built on first use."""
    version: str = "2025-11-08"
    """Census release that is opened when `uri` is None: a date, `stable` or `latest`."""
    organism: str = "homo_sapiens"
    """Key of the experiment under `census_data`: `homo_sapiens` or `mus_musculus`."""
    filter: str = "is_primary_data == True"
    """SOMA value filter over obs; the cells it matches are the corpus."""
    slice_nnz: int = 20_000_000
    """Most non-zeros of one read slice (count); bounds the memory of a read task at about 40 bytes each."""
    dir: str = "runs/census"
    """Folder in which the embedded mini Census is built (used with `uri: demo`)."""
