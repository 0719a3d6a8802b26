"""What the annotation benchmark measures: cells given candidates, each way in a process of its own.

What is timed begins with candidates as texts and ends with scores, so both pay for tokenising and encoding
them. CPU seconds stand beside: on a machine that does something else too they tell more.

Shape suffixes: N cells, C candidates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from langcell.batch import Packed
from langcell.bench.data import GENES
from langcell.bench.official import Official
from langcell.cells.rank import rank_encode
from langcell.cells.vocabulary import FIRST_GENE
from langcell.census.demo import demo_adata
from langcell.census.synthetic import LAW, draw_counts
from langcell.inference.counts import Counts
from langcell.inference.embed import tokenize
from langcell.inference.options import AnnotateOptions as ScoringOptions
from langcell.inference.pretrained import Pretrained
from langcell.inference.scoring import zero_shot
from langcell.model.interop import build_model, load_tokenizer
from langcell.model.langcell import LangCell
from langcell.model.options import ModelOptions
from langcell.objective.options import ObjectiveOptions
from langcell.text.options import TextOptions

MODEL = ModelOptions(cell_layers=6, cell_width=256, cell_heads=4)
SCORING = ScoringOptions()
WARM_CELLS = 2


@dataclass(frozen=True)
class AnnotateTask:
    """Who is annotated, by which weights.

    cells: of the demo where `export` (a trained model) is given, else generated ones of at most `max_length`
    tokens, annotated by random weights.
    """

    cells: int
    max_length: int
    seed: int
    export: str | None = None


@dataclass(frozen=True)
class Done:
    """One annotation: seconds and CPU seconds that it took, and its scores_NC (float32)."""

    seconds: float
    cpu_s: float
    scores_NC: np.ndarray


@dataclass(frozen=True)
class _Setting:
    model: LangCell
    tokenizer: PreTrainedTokenizerBase
    cells: Packed
    tau: float
    text_length: int

    @property
    def warm(self) -> Packed:
        return self.cells.select(torch.arange(min(WARM_CELLS, len(self.cells))))


def ours(task: AnnotateTask) -> Callable[[list[str], int], Done]:
    """Annotates the task's cells, so many of these candidates matched."""
    setting = _set(task)

    def annotate(cells: Packed, texts: list[str], top_k: int) -> Tensor:
        scores = zero_shot(
            setting.model,
            cells,
            tokenize(setting.tokenizer, texts, setting.text_length),
            tau=setting.tau,
            a=SCORING.a,
            top_k=top_k,
            batch_tokens=SCORING.batch_tokens,
        )
        assert scores.two_step_NC is not None
        return scores.two_step_NC

    annotate(setting.warm, ["a cell", "a cell type"], 2)
    return lambda texts, top_k: _timed(lambda: annotate(setting.cells, texts, top_k))


def notebook(task: AnnotateTask) -> Callable[..., Done]:
    """Annotates the task's cells as the notebook does, given candidates and savings (`packing`, `keys`)."""
    setting = _set(task)

    def official(**savings: bool) -> Official:
        return Official(
            setting.model,
            setting.tokenizer,
            tau=setting.tau,
            a=SCORING.a,
            max_length=setting.text_length,
            **savings,
        )

    def annotate(texts: list[str], *savings: str) -> Done:
        how = official(**dict.fromkeys(savings, True))
        return _timed(lambda: how.annotate(setting.cells, texts))

    official().annotate(setting.warm, ["a cell"])
    return annotate


def _timed(annotate: Callable[[], Tensor]) -> Done:
    began, cpu = time.perf_counter(), time.process_time()
    scores_NC = annotate().numpy()
    return Done(time.perf_counter() - began, time.process_time() - cpu, scores_NC)


def _set(task: AnnotateTask) -> _Setting:
    """Model, tokenizer and cells, in the process that will work with them."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if task.export is None:
        cells, vocab_size = generated_cells(task.cells, task.max_length, task.seed)
        model = build_model(MODEL, vocab_size, task.max_length, task.seed).eval()
        how = (ObjectiveOptions().tau, TextOptions().max_length)
        return _Setting(model, load_tokenizer(MODEL.text_init), cells, *how)
    trained = Pretrained.from_pretrained(task.export, device="cpu")
    adata = demo_adata()
    chosen = np.random.default_rng(task.seed).permutation(adata.n_obs)[: task.cells]
    counts = Counts.of(
        adata[chosen],
        trained.vocabulary,
        trained.beta,
        organism=trained.organism,
        max_length=trained.max_length,
    )
    cells = counts.sentences(0, counts.n)
    return _Setting(trained.model, trained.tokenizer, cells, trained.tau, trained.text.max_length)


def generated_cells(count: int, max_length: int, seed: int) -> tuple[Packed, int]:
    """The first cells of a generated Census as sentences, and the size of their vocabulary.

    The most frequent genes of its first block are tokens, as many as Geneformer has. Medians are left out:
    they decide the order of a sentence and not its length.
    """
    counts = next(draw_counts(LAW.block, seed))
    nnz = np.bincount(counts.indices, minlength=counts.shape[1])
    frequent = np.argsort(-nnz, kind="stable")[:GENES]
    token = np.zeros(counts.shape[1], np.uint16)
    token[frequent] = np.arange(FIRST_GENE, FIRST_GENE + GENES)
    cls = FIRST_GENE + GENES
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()
    offsets, tokens = rank_encode(
        counts[:count], totals[:count], np.ones(counts.shape[1]), token, cls, max_length
    )
    return Packed.from_offsets(tokens, offsets), cls + 1
