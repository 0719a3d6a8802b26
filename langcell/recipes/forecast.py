"""What pretraining will take, before anything is paid: `jobs/pretrain.py --plan`.

Cells are drawn from the corpus, or from obs alone where it is not prepared yet, and put into micro-batches as
training would. From their lengths and texts follow the operations of a step (`model.flops`), and from
forwards of a few, shortened, the memory of a worker (`train.footprint`). How fast operations go is measured,
by `jobs/bench.py step`, and stands in the record; where no record is of such a GPU, a share of its peak is
assumed and said to be. What more workers cost each other is the model of `jobs/bench.py scale`.

Not in it: the wait for nodes and the first step (minutes), validation, evaluation, and what fails.

Shape suffixes: B cells, K texts drawn, P pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langcell.batch import MicroBatch, Packed, TextTable
from langcell.config import Config
from langcell.corpus.blocks import sample_cells
from langcell.corpus.draft import draft
from langcell.corpus.manifest import Manifest
from langcell.corpus.schema import TRAIN
from langcell.corpus.text_table import tokenise_texts
from langcell.corpus.texts import Texts, read_texts
from langcell.errors import InputError
from langcell.model.flops import Work, count_work, step_flops
from langcell.model.interop import build_model, load_tokenizer
from langcell.objective.options import ObjectiveOptions
from langcell.objective.stages import Stage
from langcell.recipes import prepare
from langcell.recipes.pretrain import check_models, vocabulary_size
from langcell.recipes.rates import GPUS, Rate, efficiency, gpu_kind, rate_of
from langcell.recipes.rundir import with_absolute_paths
from langcell.train.footprint import Footprint, footprint

BATCHES = 16
"""Micro-batches that are drawn."""
FEW, SHORT = 12, 128
"""Cells of the batches that memory is measured with, enough that hardly two pairs are equal, and tokens of
each in the longer one: cells and texts are shortened alike."""
ROOM = 0.8
"""Share of a device's memory that a worker may be foretold to take: the forecast is no measurement."""
NODE = 8
"""GPUs of a node in the clouds."""


@dataclass(frozen=True)
class Drawn:
    """Cells drawn from the train split, and all there is to know of the rest.

    cells: of the train split; lengths_B: tokens, of a multiple of the micro-batch; text_B: index in `texts`;
    vocabulary: tokens, or what stands for them where the corpus is not prepared.
    """

    cells: int
    lengths_B: np.ndarray
    text_B: np.ndarray
    texts: Texts
    vocabulary: int
    source: str


@dataclass(frozen=True)
class StageForecast:
    """steps, cells: of the whole stage; flops_per_cell; memory: of a worker (bytes); cells_per_s: of all
    workers; hours."""

    steps: int
    cells: int
    flops_per_cell: float
    memory: Footprint
    cells_per_s: float
    hours: float


def plan(config: Config, records: Path) -> dict[str, Any]:
    """Say what the main job would take; nothing is started or written. records: folder of the benchmarks'.

    Raises InputError as the job would.
    """
    config = with_absolute_paths(config)
    check_models(config)
    if not Manifest.exists(config.corpus.dir):
        print(f"corpus     {config.corpus.dir} is not prepared yet, which takes", flush=True)
        prepare.plan(config)
        print()
    drawn = draw(config)
    if drawn.cells < config.train.global_batch:
        raise InputError(
            f"fewer cells than one global batch: the train split has {drawn.cells} cells, "
            f"--train.global_batch is {config.train.global_batch}."
        )
    kind = gpu_kind(config)
    rate = rate_of(kind, config, records)
    stages = {stage: _stage(config, drawn, stage, kind, rate, records) for stage in (1, 2)}
    print(_lines(config, drawn, stages, kind, rate), flush=True)
    return {f"stage{number}": asdict(found) for number, found in stages.items()} | {"gpu": kind}


def draw(config: Config) -> Drawn:
    """Cells of the corpus, or of its draft. Raises InputError."""
    most, rng = BATCHES * config.train.micro_batch, np.random.default_rng(config.train.seed)
    if Manifest.exists(config.corpus.dir):
        manifest = Manifest.read(config.corpus.dir)
        table = sample_cells(config.corpus.dir, manifest, "train", most, 0, ["length", "text_id"])
        texts = read_texts(config.corpus.dir)
        lengths, ids = table["length"].to_numpy(), table["text_id"].to_numpy()
        text = np.searchsorted(texts.text_id, ids)
        cells, vocabulary = manifest.counts["cells"]["train"], vocabulary_size(config)
        source = f"{config.corpus.dir}, {len(lengths):,} of them looked at"
    else:
        with prepare.placed(config) as order:
            drafted = draft(order, plan_only=True)
        train = np.flatnonzero(drafted.cells["split"].to_numpy() == TRAIN)
        chosen = rng.permutation(train)[:most]
        nnz = drafted.cells["nnz"].to_numpy()[chosen]
        lengths = np.minimum(nnz + 1, config.tokens.max_length)
        text, texts, cells = drafted.text_of_cell[chosen], drafted.texts, len(train)
        vocabulary = order.vocabulary.size if order.vocabulary else drafted.var.num_rows + 3
        source = "obs; every expressed gene counted as a token"
    if not len(lengths):
        raise InputError("the train split holds no cell: widen --census.filter.")
    again = rng.integers(0, len(lengths), most)  # in any order, as a shuffle would
    return Drawn(cells, lengths[again], text[again], texts, vocabulary, source)


def memory(config: Config, drawn: Drawn, *, gpu: bool) -> float:
    """Bytes that a worker takes at most, over both stages."""
    return max(_memory(config, drawn, *_counted(config, drawn, n), gpu=gpu).total for n in (1, 2))


def _stage(
    config: Config, drawn: Drawn, number: int, kind: str | None, rate: Rate, records: Path
) -> StageForecast:
    train = config.train
    stage, work = _counted(config, drawn, number)
    model, locked = stage.model, stage.text_locked
    encoders = (model.cell_bert.config, model.text_bert.config, model.cell_proj.out_features)
    flops = step_flops(work, *encoders, locked=locked).total / train.micro_batch
    done = flops
    if train.global_batch > train.micro_batch * train.num_workers:
        # Several lanes a worker: their views are made once more, without gradient.
        views = replace(work, genes=0, pairs=0, pair_tokens=0, pair_squares=0, keys=0, products=0)
        passes = 2 if config.objective.mgm_view == "shared" else 3
        views = replace(views, tokens=work.tokens * 2 / passes, squares=work.squares * 2 / passes)
        done += step_flops(views, *encoders, locked=locked).forward / train.micro_batch
    cells_per_s = train.num_workers * rate.flops / done
    cells_per_s *= efficiency(records, number, train.zero, train.num_workers) if kind else 1.0
    epochs = train.stage1_epochs if number == 1 else train.stage2_epochs
    steps = epochs * (drawn.cells // train.global_batch)
    cells = steps * train.global_batch
    held = _memory(config, drawn, stage, work, gpu=kind is not None)
    return StageForecast(steps, cells, flops, held, cells_per_s, cells / cells_per_s / 3600)


def _counted(config: Config, drawn: Drawn, number: int) -> tuple[Stage, Work]:
    """The stage, and the mean work of a micro-batch."""
    tokenizer = load_tokenizer(config.model.text_init)
    words_K, row_B = _words(drawn, config)
    packed, _ = tokenise_texts(words_K, tokenizer, config.text.max_length)
    length_B = torch.from_numpy(drawn.lengths_B).long()
    stage = _model(config, drawn, number, packed)
    counts = [
        _work(
            length_B[part],
            row_B[part],
            packed.lengths_B.long(),
            number,
            config.objective,
            locked=stage.text_locked,
        )
        for part in torch.arange(len(length_B)).split(config.train.micro_batch)
    ]
    return stage, Work(*torch.stack(counts).mean(0).tolist())


def _memory(config: Config, drawn: Drawn, stage: Stage, work: Work, *, gpu: bool) -> Footprint:
    train = config.train
    return footprint(
        stage,
        _short_batches(drawn),
        tokens=float(drawn.lengths_B.mean() * train.micro_batch),
        genes=work.genes,
        options=train,
        workers=train.num_workers,
        bf16=train.precision == "bf16" or (train.precision == "auto" and gpu),
        gpu=gpu,
    )


def _words(drawn: Drawn, config: Config) -> tuple[list[str], torch.Tensor]:
    """The distinct texts that the drawn cells are read with, full or shortened; the row of each cell's."""
    rng = np.random.default_rng(0)
    row_of: dict[str, int] = {}
    row_B = np.zeros(len(drawn.text_B), np.int64)
    for place, index in enumerate(drawn.text_B):
        variants = drawn.texts.variants[index]
        short = len(variants) > 1 and rng.random() < config.text.short_share
        words = variants[rng.integers(1, len(variants))] if short else variants[0]
        row_B[place] = row_of.setdefault(words, len(row_of))
    return list(row_of), torch.from_numpy(row_B)


def _work(
    length_B: torch.Tensor,
    row_B: torch.Tensor,
    text_length_K: torch.Tensor,
    number: int,
    objective: ObjectiveOptions,
    *,
    locked: bool,
) -> torch.Tensor:
    """Counts of one micro-batch: three pairs a matching cell, none of them the same as another."""
    passes = 2 if objective.mgm_view == "shared" else 3
    genes = int(objective.mask_ratio * int((length_B - 1).sum()))
    if number == 1:
        return count_work(length_B, genes, passes)
    matching = torch.arange(min(len(length_B), objective.ctm_cells or len(length_B)))
    cell_P = matching.repeat_interleave(3)
    own_P = text_length_K[row_B[cell_P]]
    texts_K = None if locked else text_length_K[row_B.unique()]
    return count_work(length_B, genes, passes, texts_K, own_P, cell_P)


def _model(config: Config, drawn: Drawn, number: int, packed: Packed) -> Stage:
    """The stage on the CPU, with two texts for each of a few cells: shortened as the cells will be, and half
    as long."""
    share = min(1.0, SHORT / float(drawn.lengths_B.mean()))
    whole = [row for _, row in zip(range(FEW), cycle(_sequences(packed)), strict=False)]
    texts = [row[: max(3, round(len(row) * part))] for part in (share / 2, share) for row in whole]
    rows = np.arange(len(texts))
    table = TextTable(
        Packed.from_sequences(texts),
        text_id=rows,
        row_KV=rows[:, None],
        term=rows,
        related_CC=torch.zeros(len(rows), len(rows), dtype=torch.bool),
    )
    model = build_model(config.model, drawn.vocabulary, config.tokens.max_length, config.train.seed)
    if config.train.activation_checkpointing:
        model.checkpoint_layers()
    matching = config.objective.ctm_cells
    if matching is not None:
        matching = max(1, round(matching * FEW / config.train.micro_batch))
    stage = Stage(
        model,
        replace(config.objective, ctm_cells=matching),
        stage=number,
        cls=drawn.vocabulary - 1,
        seed=0,
        text_train=config.model.text_train,
        texts=table,
    )
    if number == 2 and stage.text_locked:
        stage.pool_table()
    return stage


def _short_batches(drawn: Drawn) -> tuple[MicroBatch, MicroBatch]:
    """A few cells of the mean length, shortened as the texts are, and half as long."""
    length, rng = max(8, min(SHORT, round(drawn.lengths_B.mean()))), np.random.default_rng(0)
    genes = rng.integers(2, drawn.vocabulary - 1, (FEW, length))
    genes[:, 0] = drawn.vocabulary - 1
    ids = torch.arange(FEW)

    def batch(tokens: int, row: torch.Tensor) -> MicroBatch:
        cells = Packed.from_sequences(list(genes[:, :tokens]))
        return MicroBatch(cells, ids, row, row, row, torch.zeros(FEW, dtype=torch.bool))

    return batch(length // 2, ids), batch(length, FEW + ids)


def _sequences(packed: Packed) -> list[np.ndarray]:
    return np.split(packed.tokens_T.numpy(), packed.cu_seqlens_B1[1:-1].numpy())


def _lines(
    config: Config, drawn: Drawn, stages: dict[int, StageForecast], kind: str | None, rate: Rate
) -> str:
    train = config.train
    lanes = train.global_batch // train.micro_batch
    device = f"{kind} each" if kind else "CPUs"
    lines = [
        f"cells      {drawn.cells:,} to train on ({drawn.source}); {drawn.lengths_B.mean():,.0f} tokens each",
        f"workers    {train.num_workers}, {device}; {lanes} micro-batches of {train.micro_batch} cells",
        f"rate       {rate.known}",
    ]
    for number, found in stages.items():
        lines.append(
            f"stage {number}    {found.steps:,} steps, {found.flops_per_cell / 1e9:,.0f} GFLOP a cell, "
            f"{found.cells_per_s:,.1f} cells/s: {_hours(found.hours)}"
        )
    for number, found in stages.items():
        memory = found.memory
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "activations": memory.activations,
            "logits": memory.logits,
        }
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        lines.append(f"memory {number}   {memory.total / 1e9:.1f} GB a worker ({told})")
    hours = sum(found.hours for found in stages.values())
    if kind:
        room, most = GPUS[kind][1] * 2**30, max(found.memory.total for found in stages.values())
        lines[-1] += (
            f"; each {kind} has {room / 1e9:.0f} GB: "
            + ("fits" if most < ROOM * room else "TIGHT" if most < room else "DOES NOT FIT")
            + (
                ""
                if most < 0.8 * room
                else ". Lower --train.micro_batch, or --train.activation_checkpointing true"
            )
        )
        nodes = -(-train.num_workers // NODE)
        lines.append(
            f"cost       {hours * train.num_workers:,.0f} GPU-hours: {nodes} node{'s' if nodes > 1 else ''} "
            f"of {NODE} GPUs, {hours * nodes:,.0f} node-hours"
        )
    lines.append(
        f"time       {_hours(hours)} of training, beside waiting for nodes, validation and evaluation"
    )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
