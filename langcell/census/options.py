"""Where cells come from: the options of the census room (standard library only)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class CensusOptions:
    """Which cells are read."""

    uri: str | None = None
    """Where the cells are: a SOMA collection with the Census layout (a local folder, s3://...), a folder of .h5ad files with raw counts, or a Hugging Face `datasets` folder of token sentences. None: the public release `version`. `demo`: the embedded mini Census, built on first use."""
    version: str = "2025-11-08"
    """Census release that is opened when `uri` is None: a date, `stable` or `latest`."""
    organism: str = "homo_sapiens"
    """Key of the experiment under `census_data`: `homo_sapiens` or `mus_musculus`; of .h5ad files, what they hold."""
    filter: str = "is_primary_data == True"
    """SOMA value filter over obs; the cells it matches are the corpus. The same words select cells of .h5ad files."""
    expected_cells: int | None = None
    """Cells that the filter must match, for a preset that pins its corpus (count). None: any number."""
    obs_map: str | None = None
    """YAML file that maps columns and labels of .h5ad or `datasets` files to facets and ontology ids (README)."""
    symbols: str | None = None
    """Table that maps gene symbols of .h5ad files to Ensembl ids: .tsv or .csv of two columns, or Geneformer's gene name dictionary (pickle, read by a restricted reader)."""
    bad_cells: Literal["error", "skip"] = "error"
    """What to do with cells whose counts are none (negative, no integer, ...) or that have no gene of the vocabulary: `error` ends the job and names them, `skip` leaves them out, counts and lists them."""
    most_unreadable: float = 0.01
    """Share of the cells that `bad_cells: skip` may leave out because their slices cannot be read (0 to 1); more is an outage, and ends the job, which can go on later."""
    slice_nnz: int = 7_000_000
    """Most non-zeros of one read slice (count); bounds the memory of a task (`--plan` says at how much)."""
    attempts: int = 5
    """Times a slice is tried to be read before the storage is given up (count), with growing waits between."""
    tiledb: dict[str, str | int] = field(default_factory=dict)
    """TileDB settings beside the measured ones, such as `vfs.s3.region` (never a secret: TileDB takes those from the environment)."""
    dir: str = "runs/census"
    """Folder in which the embedded mini Census is built (used with `uri: demo`)."""
