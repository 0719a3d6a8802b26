"""What makes a corpus one: the manifest, written last.

Two hashes. The *recipe* is what was asked for (release, filter, split, template, ontology releases,
lengths, layout), known before a count is read: by it a re-run says that the corpus is there already, or
names what differs and refuses, for a folder never mixes two corpora. The *corpus hash* adds what came out
of obs and of the counts (the selected cells with their split and text, beta, the vocabulary): all that
a block is a function of. Checkpoints carry it.

A manifest names every file with its size, so that a truncated or missing one is refused at once; the
digests allow a full check. It never names a file that is not whole: it is written after all of them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pyarrow import fs

import langcell
from langcell.corpus.schema import SPLITS
from langcell.errors import InputError
from langcell.storage import digest_json, open_root, read_file, sizes, write_file

NAME = "manifest.json"
FORMAT = 2
LIBRARIES = (
    "ray",
    "tiledbsoma",
    "cellxgene-census",
    "cellxgene-ontology-guide",
    "pyarrow",
    "numpy",
    "numba",
)


@dataclass(frozen=True)
class File:
    """A file of the corpus: name relative to its folder, bytes, blake2b-16 of its content (hex)."""

    file: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Block(File):
    """A token block: the cells of one slice and split. rows: cells; row_groups: cells of each row group."""

    split: str
    rows: int
    row_groups: list[int]
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """A whole corpus.

    hash, recipe_hash, beta_hash, vocabulary_hash: hex. recipe: what was asked for. counts: `cells` and
    `tokens` by split, `texts`, `genes` (genes that can stand in a sentence), `left_out` (cells that are
    in no block, by fault), `genes_left_out` (by reason), `slices`. ontologies: release by name. coverage:
    what each facet resolved to, and the source's remarks. blocks: by split, then slice. files: all others.
    versions: libraries that wrote it.
    """

    hash: str
    recipe: dict[str, Any]
    recipe_hash: str
    beta_hash: str
    vocabulary_hash: str
    ontologies: dict[str, str]
    counts: dict[str, Any]
    coverage: dict[str, Any]
    blocks: list[Block]
    files: list[File]
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def exists(cls, dir: str) -> bool:
        """Whether a manifest stands in the corpus folder `dir` (a path or pyarrow filesystem URI)."""
        return sizes(open_root(dir), [NAME])[0] is not None

    @classmethod
    def read(cls, dir: str) -> Manifest:
        """The manifest of the corpus in `dir`.

        Raises InputError where there is none, and where a file that it names is missing or of another
        size.
        """
        root = open_root(dir)
        try:
            content = json.loads(read_file(root, NAME))
        except FileNotFoundError:
            raise InputError(
                f"corpus.dir: {dir} holds no whole corpus ({NAME} is missing); run jobs/prepare.py."
            ) from None
        except OSError as error:
            raise InputError(f"corpus.dir: {dir} cannot be read: {error}") from error
        except ValueError as error:
            raise InputError(
                f"corpus.dir: {dir}/{NAME} is no JSON ({error}); prepare the corpus anew."
            ) from error
        if content.get("format") != FORMAT:
            raise InputError(
                f"corpus.dir: {dir} is of corpus format {content.get('format')}, this version reads "
                f"{FORMAT}; prepare it anew."
            )
        content["blocks"] = [Block(**block) for block in content["blocks"]]
        content["files"] = [File(**file) for file in content["files"]]
        manifest = cls(**content)
        manifest._check_files(root, dir)
        return manifest

    def _check_files(self, root: fs.FileSystem, dir: str) -> None:
        files = [*self.files, *self.blocks]
        try:
            found = sizes(root, [file.file for file in files])
        except OSError as error:  # storage that gives files may still refuse to list them
            raise InputError(f"corpus.dir: {dir} cannot be listed: {error}") from error
        broken = [
            f"{file.file} ({'missing' if size is None else f'{size} bytes instead of {file.bytes}'})"
            for file, size in zip(files, found, strict=True)
            if size != file.bytes
        ]
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise InputError(
                f"corpus.dir: {dir} is damaged: {', '.join(broken[:3])}{more}. "
                "Delete the folder and prepare the corpus anew."
            )

    def write(self, root: fs.FileSystem) -> None:
        """Write manifest.json, atomically. All other files must stand."""
        write_file(root, NAME, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @property
    def cells(self) -> int:
        """Cells of all splits."""
        return sum(self.counts["cells"].values())

    def split(self, name: str) -> list[Block]:
        """The blocks of one split, in order of their slices."""
        return [block for block in self.blocks if block.split == name]


def corpus_hash(
    recipe: dict[str, Any], selection: str, left_out: str, beta_hash: str, vocabulary_hash: str
) -> str:
    """Hash of all that a corpus is a function of. selection, left_out: digests of the selected cells, and of
    those among them that are in no block."""
    return digest_json([FORMAT, recipe, selection, left_out, beta_hash, vocabulary_hash])


def count_blocks(blocks: list[Block]) -> dict[str, dict[str, int]]:
    """`cells` and `tokens` of each split."""
    return {
        "cells": {s: sum(b.rows for b in blocks if b.split == s) for s in SPLITS},
        "tokens": {s: sum(b.tokens for b in blocks if b.split == s) for s in SPLITS},
    }


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What differs between two recipes, one line a field, named as the options are."""
    lines = []
    for key in sorted(there.keys() | asked.keys()):
        a, b = there.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            lines.append(f"{key}: {a!r} there, {b!r} asked for")
    return lines


def refuse_other(there: dict[str, Any], asked: dict[str, Any], dir: str) -> None:
    """Raises InputError if the corpus in `dir`, whole or not, has another recipe than the one asked for."""
    lines = differences(there, asked)
    if lines:
        raise InputError(
            f"corpus.dir: {dir} holds another corpus, which differs in\n  "
            + "\n  ".join(lines)
            + "\nA folder never mixes two: choose another --corpus.dir, or delete this one."
        )


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a corpus depends on."""
    return {"langcell": langcell.__version__} | {name: metadata.version(name) for name in LIBRARIES}
