"""From LangCell's released layout to an export, and back: jobs/convert.py.

Released weights stand alone: their genes, medians and tokenizer come from elsewhere (Geneformer's
dictionaries, PubMedBERT), and their code has the rest written into it. An export holds all of it, so both
ways end in `write_export`, and an export in the released layout comes back without being told anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import langcell
from langcell.cells.beta import Beta
from langcell.cells.symbols import GENES_OF, read_symbols
from langcell.cells.vocabulary import Vocabulary
from langcell.config import ConvertConfig
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.inference.pretrained import TYPES, Pretrained
from langcell.model.interop import load_tokenizer
from langcell.model.official import CELL_LENGTH, TAU, TEXT_LENGTH, is_official, load_official
from langcell.recipes.card import converted_card
from langcell.recipes.export import write_export
from langcell.recipes.options import ConvertOptions
from langcell.text.options import TextOptions

PUBMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
"""PubMedBERT's present name."""


def run(config: ConvertConfig) -> dict[str, Any]:
    """Convert a model; the summary, which also stands in summary.json of `run.dir`.

    Raises InputError for what the user can mend.
    """
    asked, directory = config.convert, Path(config.run.dir)
    target = Path(asked.target) if asked.target else directory / "export"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"convert.target: {target} is not empty; choose another, or delete it")
    model = _read(asked)
    stated = {name: value for name, value in model.config.items() if name != "official_code"}
    model = replace(model, config={**stated, "layout": asked.layout})
    write_export(model, target)
    directory.mkdir(parents=True, exist_ok=True)
    summary = {
        "source": asked.source,
        "export": str(target),
        "layout": asked.layout,
        "genes": len(model.vocabulary.gene_ids),
        "vocabulary_hash": model.vocabulary.hash,
        "beta_hash": model.beta.hash,
    }
    write_whole(directory / "summary.json", json.dumps(summary, indent=2))
    print(f"model    {target}\nsummary  {directory / 'summary.json'}", flush=True)
    return summary


def _read(asked: ConvertOptions) -> Pretrained:
    """The model that is converted. Raises InputError."""
    if not asked.source:
        raise InputError("convert.source: name the folder of the model")
    source = Path(asked.source)
    if is_official(source) and not (source / "vocabulary.json").exists():
        return _released(source, asked)
    model = Pretrained.from_pretrained(source, device="cpu")
    model.refuse_classifier()  # its head has no place in either layout
    return model


def _released(source: Path, asked: ConvertOptions) -> Pretrained:
    """Released weights with what belongs to them. Raises InputError."""
    if not asked.tokens or not asked.medians:
        raise InputError(
            f"{source} holds released weights alone: name the token dictionary (--convert.tokens) and the "
            "medians (--convert.medians) that they were trained with, Geneformer's for LangCell's own"
        )
    vocabulary, beta = Vocabulary.load(asked.tokens), Beta.load(asked.medians)
    if without := sorted(set(vocabulary.gene_ids) - set(beta.feature_id)):
        raise InputError(
            f"convert.medians: {asked.medians} has no median of {len(without)} genes of {asked.tokens} "
            f"({', '.join(without[:3])}, ...); they are of two models"
        )
    model = load_official(source)
    cell, text = model.cell_bert.config, model.text_bert.config
    if cell.vocab_size != vocabulary.size:
        raise InputError(
            f"convert.tokens: {asked.tokens} and <cls> are {vocabulary.size} tokens, but the cell encoder of "
            f"{source} has rows for {cell.vocab_size}"
        )
    own = source if (source / "tokenizer_config.json").exists() else PUBMEDBERT
    tokenizer = load_tokenizer(asked.tokenizer or str(own), "convert.tokenizer")
    if len(tokenizer) > text.vocab_size:
        raise InputError(
            f"convert.tokenizer: it has {len(tokenizer)} tokens, but the text encoder of {source} has rows "
            f"for {text.vocab_size}"
        )
    if asked.symbols:
        symbol_of = {gene: name for name, gene in read_symbols(asked.symbols, "convert.symbols").items()}
        beta = replace(beta, feature_name=[symbol_of.get(gene, "") for gene in beta.feature_id])
    made = Pretrained(
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        beta=beta,
        config={
            "langcell": langcell.__version__,
            "projection": model.cell_proj.out_features,
            "pooling": model.pooling,
            "organism": _organism(vocabulary, asked.tokens),
            "max_length": min(CELL_LENGTH, cell.max_position_embeddings),
            "tau": TAU,
            "text": asdict(TextOptions(max_length=min(TEXT_LENGTH, text.max_position_embeddings))),
            "beta_hash": beta.hash,
            "vocabulary_hash": vocabulary.hash,
        },
        types=TYPES.empty_table(),
        name=source.absolute().name,
    )
    return replace(made, card=converted_card(made, made.name))


def _organism(vocabulary: Vocabulary, tokens: str) -> str:
    for organism, prefix in GENES_OF.items():
        if all(gene.startswith(prefix) for gene in vocabulary.gene_ids):
            return organism
    raise InputError(
        f"convert.tokens: {tokens} holds genes ({', '.join(vocabulary.gene_ids[:3])}, ...) that are not all "
        f"Ensembl ids of one organism: {', '.join(GENES_OF)}"
    )
