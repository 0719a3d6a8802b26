"""One real step of the paper's preset, with random weights of exactly the paper's shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from langcell.bench.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
GENEFORMER_VOCABULARY = 25_426


def make_checkpoints(folder: Path) -> tuple[str, str]:
    """Geneformer-12L and PubMedBERT-base in shape, random in weights."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    geneformer = BertConfig(
        vocab_size=GENEFORMER_VOCABULARY, hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
        intermediate_size=1024, max_position_embeddings=2048, hidden_act="relu",
    )  # fmt: skip
    BertForMaskedLM(geneformer).save_pretrained(folder / "cell")
    BertModel(BertConfig(vocab_size=30_522)).save_pretrained(folder / "text")
    return str(folder / "cell"), str(folder / "text")


def one_step(rank: int, cell_init: str, text_init: str) -> tuple[dict[str, float], dict[str, float]]:
    """Losses of the step, and by module how far it moved the weights (largest change)."""
    import torch

    from langcell.batch import MicroBatch, Packed, TextTable
    from langcell.config import parse
    from langcell.model.interop import build_model
    from langcell.objective.stages import LOSSES, Stage
    from langcell.train.engine import build_engine

    torch.set_num_threads(2)
    config = parse(
        "",
        CONFIGS / "demo.yaml",
        [f"--config={CONFIGS / name}" for name in ("sclibrary.yaml", "langcell.yaml")],
    )
    model_options = replace(config.model, cell_init=cell_init, text_init=text_init)
    train = replace(config.train, num_workers=1, micro_batch=2, global_batch=2, precision="fp32", gpus=False)
    vocab_size = GENEFORMER_VOCABULARY + 1
    rng = np.random.default_rng(0)
    texts = TextTable(
        Packed.from_sequences([rng.integers(5, 30_000, n) for n in (300, 512)]),
        text_id=np.array([10, 20]),
        row_KV=np.array([[0], [1]]),
        term=np.array([0, 1]),
        related_CC=torch.zeros(2, 2, dtype=torch.bool),
    )
    model = build_model(model_options, vocab_size, config.tokens.max_length, seed=0)
    stage = Stage(
        model,
        config.objective,
        stage=2,
        cls=vocab_size - 1,
        seed=0,
        text_train=model_options.text_train,
        texts=texts,
    )
    sentences = [
        np.r_[vocab_size - 1, 2 + rng.permutation(GENEFORMER_VOCABULARY - 2)[:n]] for n in (2047, 900)
    ]
    batch = MicroBatch(
        Packed.from_sequences(sentences),
        soma_joinid_B=torch.tensor([3, 4]),
        text_id_B=torch.tensor([10, 20]),
        term_B=torch.tensor([0, 1]),
        text_row_B=torch.tensor([0, 1]),
        short_B=torch.zeros(2, dtype=torch.bool),
    )
    engine = build_engine(stage, train, lr=train.lr, steps=1, device=torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}
    shares = engine(batch, 0)
    engine.backward(shares["total"])
    engine.step()
    moved: dict[str, float] = {}
    for name, parameter in engine.module.model.named_parameters():
        module = "crossattention" if "crossattention" in name else name.split(".")[0]
        moved[module] = max(moved.get(module, 0.0), float((parameter.detach() - before[name]).abs().max()))
    return {name: float(shares[name].detach()) for name in LOSSES[2]}, moved


@pytest.mark.slow
def test_one_step_of_the_paper(tmp_path: Path) -> None:
    [(losses, moved)] = run_ranks(one_step, 1, *make_checkpoints(tmp_path))
    assert all(math.isfinite(loss) for loss in losses.values())
    # Random weights know nothing: MGM starts near log of the vocabulary, matching near log 2.
    assert losses["mgm"] == pytest.approx(math.log(GENEFORMER_VOCABULARY), abs=0.5)
    assert losses["ctm"] == pytest.approx(math.log(2), abs=0.3)
    assert moved.keys() == {
        "cell_bert", "gene_head", "cell_proj", "text_bert", "crossattention", "text_proj", "ctm_head",
    }  # fmt: skip
    assert all(0 < change < 1e-3 for change in moved.values()), moved
