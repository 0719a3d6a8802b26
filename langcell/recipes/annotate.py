"""Annotate a study or a Census query on a cluster: jobs/annotate.py.

What model, file and candidates tell is checked before Ray is started; then actors call the cells
(`annotating`), the file is filled as their answers come (`annotated`), and a figure and a summary close it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from langcell.cells.faults import Fault
from langcell.cells.symbols import read_symbols
from langcell.census.experiment import Census
from langcell.census.options import CensusOptions
from langcell.census.slices import Source, make_slices
from langcell.census.source import open_source
from langcell.census.tokenised import TokenisedFolder
from langcell.config import AnnotateConfig
from langcell.corpus.ledger import Ledger, SliceFaults
from langcell.corpus.measuring import measure
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.inference import figures
from langcell.inference.annotate import KEY, UNASSIGNED, Annotator, choose, columns, earlier, how
from langcell.inference.candidates import read_file
from langcell.inference.figures import JointSpace
from langcell.inference.genes import known_genes, warn_of_few
from langcell.inference.pretrained import Pretrained
from langcell.recipes.annotated import AnnotatedFile
from langcell.recipes.annotating import CensusStudy, FileStudy, Study, annotate_all
from langcell.recipes.options import AnnotateJobOptions
from langcell.recipes.report import png
from langcell.recipes.session import connect
from langcell.storage import absolute

OBS = ("cell_type", "cell_type_ontology_term_id", "tissue", "disease", "dataset_id", "donor_id")
"""Columns of a Census that stand in its annotated file, beside soma_joinid."""


PIECE_NNZ = 1_000_000
"""Most non-zeros of a slice that is annotated: some 600 cells, so that a small query has work for many."""


def run(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate the cells; the summary, which also stands in summary.json of `run.dir`, beside annotated.h5ad
    and annotated.png.

    Raises InputError for what the user can mend.
    """
    asked, started = config.annotate, time.monotonic()
    if asked.candidates and asked.candidates_file:
        raise InputError("annotate.candidates and annotate.candidates_file: give one of them")
    place = absolute(asked.model)
    model = Pretrained.from_pretrained(place, device="cpu")
    given = read_file(asked.candidates_file) if asked.candidates_file else asked.candidates or None
    annotator = Annotator(model, choose(model, given, asked.tissue), config.score)
    free = sum(not one.term for one in annotator.candidates)
    print(
        f"model    {model.name}: {len(model.vocabulary.gene_ids):,} genes of {model.organism}; "
        f"{len(annotator.candidates)} candidates" + f", {free} of them free text" * bool(free),
        flush=True,
    )
    directory = Path(absolute(config.run.dir))
    directory.mkdir(parents=True, exist_ok=True)
    if asked.data is not None:
        study, source, found = _file(absolute(asked.data), asked, model)
        with connect(config.run):
            summary = _annotate(config, directory, place, annotator, study, source, found)
    else:
        for name in ("layer", "symbols"):
            if getattr(asked, name) is not None:
                raise InputError(f"annotate.{name} is for .h5ad files (annotate.data); a Census has none")
        if asked.cluster is not None and asked.cluster not in OBS:
            raise InputError(f"annotate.cluster: of a Census one of {', '.join(OBS)}")
        with closing(_census(config.census, model)) as cells, connect(config.run):
            query, source = _query(cells, config.census)
            judge = _Judge(cells, config.census, query)
            found = {"genes": query.encoder(model)[1].genes}
            print(f"genes    {found['genes']:,} of {len(query.feature_id):,}", flush=True)
            known = len(known_genes(model.vocabulary, model.beta))
            warn_of_few(found["genes"], known, config.census.uri or "the Census")
            summary = _annotate(config, directory, place, annotator, query, source, found, judge)
    seconds = time.monotonic() - started
    summary |= {"seconds": seconds, "cells_per_s": summary["cells"] / seconds}
    write_whole(directory / "summary.json", json.dumps(summary, indent=2))
    most = ", ".join(f"{name} {n:,}" for name, n in list(summary["labels"].items())[:8])
    print(f"cells    {summary['cells']:,}: {most}")
    for what, name in (("file", "annotated.h5ad"), ("figure", "annotated.png"), ("summary", "summary.json")):
        if (directory / name).exists():
            print(f"{what:<8} {directory / name}", flush=True)
    return summary


class _Judge:
    """What is done with cells whose counts are none: as `census.bad_cells` says. An empty droplet, or a cell
    without a gene of the model, is no fault but unassigned."""

    def __init__(self, source: Source, options: CensusOptions, study: CensusStudy) -> None:
        most = options.most_unreadable * len(study.joinid)
        self._ledger, self._joinid = Ledger(source, options.bad_cells, most), study.joinid

    def __call__(self, index: int, rows: np.ndarray, fault: np.ndarray, reason: str) -> None:
        bad = np.where(np.isin(fault, (Fault.EMPTY, Fault.NO_GENE)), Fault.NONE, fault)
        self._ledger.add(SliceFaults.of(index, self._joinid[rows], bad, reason))

    @property
    def counts(self) -> dict[str, int]:
        """Cells left unassigned by fault."""
        return self._ledger.counts


def _file(path: str, asked: AnnotateJobOptions, model: Pretrained) -> tuple[FileStudy, Path, dict[str, Any]]:
    """The .h5ad file as work, and what was found in it. Raises InputError for a file that cannot be used."""
    try:
        adata = anndata.read_h5ad(path, backed="r")
    except Exception as error:  # what is no .h5ad file raises whatever its parts run into
        raise InputError(f"annotate.data: {path} cannot be read as .h5ad: {error}") from error
    try:
        if asked.cluster is not None and asked.cluster not in adata.obs:
            raise InputError(
                f"annotate.cluster: obs has no column {asked.cluster}; it has: {', '.join(adata.obs)}"
            )
        earlier(adata.obs, adata.uns.get(KEY), KEY)
        symbols = read_symbols(asked.symbols, "annotate.symbols") if asked.symbols else None
        study = FileStudy(path, asked.layer, symbols, adata.n_obs, asked.chunk)
        counts = study.counts(model)
        print(f"genes    {counts.genes:,} of the file's {adata.n_vars:,} by {counts.naming}", flush=True)
        return study, Path(path), {"genes": counts.genes, "naming": counts.naming}
    finally:
        adata.file.close()


def _census(options: CensusOptions, model: Pretrained) -> Source:
    if options.organism != model.organism:
        raise InputError(
            f"census.organism is {options.organism}, but {model.name} was trained on {model.organism}"
        )
    source = open_source(options)
    if isinstance(source, TokenisedFolder):
        source.close()
        raise InputError(f"census.uri: {options.uri} holds sentences; counts are needed to annotate")
    return source


def _query(source: Source, options: CensusOptions) -> tuple[CensusStudy, pd.DataFrame]:
    """The selected cells as work, and their obs."""
    obs = source.obs(OBS)
    if isinstance(source, Census) and obs["nnz"].null_count:
        obs = measure(source.reader, options.attempts, obs)
    joinid = obs["soma_joinid"].to_numpy()
    study = CensusStudy(
        source.reader,
        make_slices(obs.select(["soma_joinid", "raw_sum", "nnz"]), min(options.slice_nnz, PIECE_NNZ)),
        joinid,
        source.var()["feature_id"].to_pylist(),
        options.attempts,
    )
    return study, obs.select(["soma_joinid", *OBS]).to_pandas().set_index(joinid.astype(str))


def _annotate(
    config: AnnotateConfig,
    directory: Path,
    place: str,
    annotator: Annotator,
    study: Study,
    source: Path | pd.DataFrame,
    found: dict[str, Any],
    judge: _Judge | None = None,
) -> dict[str, Any]:
    """Call all cells and write file and figure; the summary. found: of the genes; judge: of cells of a
    Census."""
    asked, width = config.annotate, annotator.z_CP.shape[1]
    with AnnotatedFile(directory / "annotated.h5ad", source, width) as file:
        note = judge or (lambda *_: None)
        for row, calls in annotate_all(study, place, annotator.candidates, config.score, asked.actors, note):
            file.put(row, calls)
        cluster = None if asked.cluster is None else file.obs[asked.cluster]
        table = columns(file.calls, annotator, cluster)
        file.finish(table, KEY, how(annotator) | found)
        labels = table[f"{KEY}_label"].astype(str).to_numpy()
        space = _sample(file, labels, annotator, asked.figure_cells)
    figure = figures.joint_space(space)
    if figure is not None:
        write_whole(directory / "annotated.png", png(figure))
    count = Counter(labels.tolist())
    return {
        "cells": len(labels),
        "unassigned": count[UNASSIGNED],
        "left_out": judge.counts if judge else {},
        "labels": dict(count.most_common()),
        "candidates": [one.label for one in annotator.candidates],
        "model": place,
        "mean_score": float(table[f"{KEY}_score"].mean()),
        **found,
    }


def _sample(file: AnnotatedFile, labels: np.ndarray, annotator: Annotator, most: int) -> JointSpace:
    """A seeded sample of the cells, and the texts that were an answer."""
    rows = np.arange(file.n)
    if file.n > most:
        rows = np.sort(np.random.default_rng(0).choice(file.n, most, replace=False))
    found = set(labels)
    answered = [i for i, one in enumerate(annotator.candidates) if one.label in found]
    return JointSpace(
        z_NP=file.embeddings(rows),
        cell_type=labels[rows].tolist(),
        z_KP=annotator.z_CP.cpu().numpy()[answered],
        text=[annotator.candidates[i].label for i in answered],
    )
