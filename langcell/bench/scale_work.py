"""What `scale` measures: the collectives of real steps at a few workers, and the data road on one CPU.

The model is the real one (6 layers of 256, MiniLM) in bf16, and so is the number of cells of a
micro-batch; the cells are a few genes long, since no collective depends on their length (a test holds it),
and four workers then fit a laptop. Counted is the second step: at ZeRO 3 the first also agrees on the order
of modules.

Shape suffixes: B cells, C cells of the corpus file.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.bench.collectives import Collective, Collectives
from langcell.bench.data import GENES
from langcell.bench.processes import Work, memory_mb
from langcell.cells.vocabulary import FIRST_GENE
from langcell.corpus.microbatch import micro_batch
from langcell.corpus.options import CorpusOptions
from langcell.corpus.plan import Plan, RowGroups
from langcell.corpus.schema import BLOCK_ENCODING, BLOCK_SCHEMA, block_name
from langcell.corpus.stream import deal_window
from langcell.model.flops import Work as Counts
from langcell.model.flops import count_work, step_flops
from langcell.model.options import ModelOptions

VOCABULARY = FIRST_GENE + GENES + 1
"""Tokens, as Geneformer's dictionary with `<cls>`."""
CONTEXT = 2_048
GENES_MEAN, GENES_SPREAD = 1_670.0, 0.7
"""Expressed genes of a cell: lognormal, with that mean and that deviation of the logarithm."""
TEXT_TOKENS = 260
MASKED = 0.15
COUNTED_TOKENS, COUNTED_TEXTS = 8, 64
Seen = dict[tuple[int, int], list[Collective]]
"""Collectives of a step, by (stage, ZeRO stage)."""


def lengths(cells: int, seed: int = 0) -> np.ndarray:
    """Tokens of cells as the Census has them, `<cls>` included, cut to the context: int64 [C]."""
    mu = np.log(GENES_MEAN) - GENES_SPREAD**2 / 2
    genes_C = np.random.default_rng(seed).lognormal(mu, GENES_SPREAD, cells).astype(np.int64)
    return np.clip(genes_C + 1, 2, CONTEXT)


def flops_of_step(stage: int, cell: BertConfig, text: BertConfig, projection: int, cells: int) -> float:
    """FLOPs of a packed micro-batch of so many cells of mean composition, forward and backward."""
    many = 64 * cells
    length_B = torch.from_numpy(lengths(many))
    texts, pairs = None, None
    cell_of_pair_P = torch.arange(many).repeat_interleave(3)
    if stage == 2:
        texts = torch.full((many,), TEXT_TOKENS)
        pairs = torch.full((3 * many,), TEXT_TOKENS)
    counts = count_work(
        length_B,
        int(MASKED * int((length_B - 1).sum())),
        3,
        texts,
        pairs,
        cell_of_pair_P if stage == 2 else None,
    )
    return step_flops(Counts(*counts.tolist()), cell, text, projection).total * cells / many


def count_collectives(rank: int, cells: int, zeros: list[int]) -> tuple[Seen, float]:
    """Collectives of the second step of each stage at each ZeRO stage, and this rank's peak (MB)."""
    from langcell.model.interop import build_model
    from langcell.objective.options import ObjectiveOptions
    from langcell.objective.stages import Stage
    from langcell.train.engine import build_engine
    from langcell.train.options import TrainOptions

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = torch.distributed.get_world_size()
    seen: Seen = {}
    for number in (1, 2):
        for zero in zeros:
            train: Any = TrainOptions(
                micro_batch=cells,
                global_batch=world * cells,
                precision="bf16",
                zero=zero,  # type: ignore[arg-type]
            )
            stage = Stage(
                build_model(ModelOptions(), VOCABULARY, CONTEXT, seed=0),
                ObjectiveOptions(),
                stage=number,
                cls=VOCABULARY - 1,
                seed=0,
                text_train="all",
                texts=_texts(),
            )
            engine = build_engine(stage, train, lr=1e-4, steps=10, device=torch.device("cpu"))
            batch = _batch(rank, cells)
            for step in (0, 1):
                with Collectives() as collectives:
                    engine.backward(engine(batch, step)["total"])
                    engine.step()
            seen[number, zero] = collectives.seen
            engine.destroy()
    return seen, memory_mb(os.getpid())["VmHWM"]


def _texts() -> TextTable:
    rows = np.random.default_rng(1).integers(1_000, 30_000, (COUNTED_TEXTS, COUNTED_TOKENS))
    return TextTable(
        Packed.from_sequences(list(rows)),
        text_id=np.arange(COUNTED_TEXTS),
        row_KV=np.arange(COUNTED_TEXTS)[:, None],
        term=np.arange(COUNTED_TEXTS),
        related_CC=torch.zeros(COUNTED_TEXTS, COUNTED_TEXTS, dtype=torch.bool),
    )


def _batch(rank: int, cells: int) -> MicroBatch:
    tokens = np.random.default_rng(rank).integers(FIRST_GENE, VOCABULARY - 1, (cells, COUNTED_TOKENS))
    tokens[:, 0] = VOCABULARY - 1
    joinid_B = torch.arange(cells) + rank * cells
    text_B = joinid_B % COUNTED_TEXTS
    return MicroBatch(
        cells=Packed.from_sequences(list(tokens)),
        soma_joinid_B=joinid_B,
        text_id_B=text_B,
        term_B=text_B,
        text_row_B=text_B,
        short_B=torch.zeros(cells, dtype=torch.bool),
    )


def road(directory: str, cells: int) -> Work:
    """Token blocks on disk to micro-batches of so many cells, as a stream's tasks and worker do it; returns
    how many cells a run makes ready."""
    options = CorpusOptions()
    file = block_name("train", 0)
    groups = _write(Path(directory) / file, options.window_steps * cells, options.row_group_cells)
    plan = Plan(
        (RowGroups(file, tuple(groups)),),
        seed=0,
        global_batch=cells,
        micro_batch=cells,
        window_steps=options.window_steps,
    )
    texts = _texts()

    def work() -> int:
        done = 0
        for window in plan.windows(0, 0):
            rows = deal_window(directory, plan, window)
            for step in range(len(rows)):
                done += len(micro_batch(rows.slice(step, 1), texts, epoch=0, short_share=0.25, seed=0))
        return done

    return work


def _write(path: Path, cells: int, row_group: int) -> list[int]:
    """One block of that many cells; the rows of its row groups."""
    length_C = lengths(cells)
    rng = np.random.default_rng(0)
    tokens = rng.integers(FIRST_GENE, VOCABULARY - 1, int(length_C.sum())).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(length_C)]).astype(np.int32)
    columns = {
        "soma_joinid": pa.array(np.arange(cells)),
        "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
        "length": pa.array(length_C.astype(np.int32)),
        "text_id": pa.array(rng.integers(0, COUNTED_TEXTS, cells)),
        "term": pa.array([""] * cells),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).cast(BLOCK_SCHEMA)
    pq.write_table(table, path, row_group_size=row_group, **BLOCK_ENCODING)
    return [min(row_group, cells - start) for start in range(0, cells, row_group)]
