"""What an export says of itself: the types it was trained on, and its card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import Vocabulary
from langcell.config import Config, parse
from langcell.corpus.manifest import Manifest
from langcell.corpus.texts import Texts
from langcell.errors import InputError
from langcell.inference.pretrained import TYPES, Pretrained
from langcell.inference.tables import TABLES, Table
from langcell.recipes.card import LICENCES, converted_card, trained_card, tuned_card
from langcell.recipes.export import export, trained_types, write_export
from langcell.recipes.pretrain import check_models
from langcell.recipes.rundir import identity
from langcell.text.ontology import Ontology
from langcell.text.releases import ONTOLOGIES
from langcell.train.store import Cursor, Record
from tests.recipes.making import DEMO
from tests.recipes.making import config as demo_config

BLOOD, LUNG, B, T = "UBERON:0000178", "UBERON:0002048", "CL:0000236", "CL:0000084"
RECORD = Record(Cursor(stage=2, epoch=16, step=0, global_step=460, plan="plan"), updates=460, tau=0.2)


def _texts(rows: list[tuple[str, str | None, int]], **more: list[str]) -> Texts:
    """(term, tissue id, training cells) each, and two cells of every text in the other splits."""
    n = len(rows)
    return Texts(
        text_id=np.arange(n),
        variants=[["text"]] * n,
        term=[term for term, _, _ in rows],
        ancestors=[[]] * n,
        facet_ids={"tissue": [tissue for _, tissue, _ in rows], **more},  # type: ignore[dict-item]
        cells=np.array([[cells, 2, 2, 2] for _, _, cells in rows], np.int64).reshape(n, 4),
    )


def _table(name: str, empty: str = "") -> Table:
    truth = np.array([] if empty else [0, 0, 1, 1], np.int64)
    return Table(
        name=name,
        candidates=(B, T),
        labels={B: "B cell", T: "T cell"},
        rows=np.arange(len(truth)),
        types=tuple((B, T)[i] for i in truth),
        truth=truth,
        predicted={} if empty else {"ct": truth, "two_step": np.array([0, 1, 1, 1])},
        unscored={},
        empty=empty,
    )


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        hash="cafe01",
        recipe={},
        recipe_hash="",
        beta_hash="",
        vocabulary_hash="",
        ontologies=dict.fromkeys(ONTOLOGIES, "2026-01-01"),
        counts={"cells": {"train": 379, "val": 40, "test": 90, "held_out": 191}, "texts": 8},
        coverage={},
        blocks=[],
        files=[],
        versions={},
    )


@pytest.fixture
def demo() -> Config:
    return parse("", DEMO, [])


@pytest.fixture(scope="module")
def model(export: Path) -> Pretrained:
    return Pretrained.from_pretrained(export, device="cpu")


def test_types_are_those_of_training_cells_by_tissue() -> None:
    rows = [(B, BLOOD, 3), (B, BLOOD, 4), (B, LUNG, 1), (T, BLOOD, 0), ("", BLOOD, 9), (T, "unknown", 5)]
    general = [BLOOD, BLOOD, LUNG, BLOOD, BLOOD, BLOOD]
    table = trained_types(_texts(rows, tissue_general=general), Ontology.packaged())
    assert table.schema == TYPES
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (T, "T cell", "", BLOOD, 5),
        (B, "B cell", BLOOD, BLOOD, 7),
        (B, "B cell", LUNG, LUNG, 1),
    ]
    alone = trained_types(replace(_texts([(B, None, 2)]), facet_ids={}), Ontology.packaged())
    assert [tuple(row.values()) for row in alone.to_pylist()] == [(B, "B cell", "", "", 2)]
    assert trained_types(_texts([]), Ontology.packaged()).equals(TYPES.empty_table())


def test_the_card_says_what_was_trained_on_what(model: Pretrained, demo: Config, manifest: Manifest) -> None:
    card = trained_card(model, demo, manifest, RECORD)
    for said in (
        "# demo",
        "379 trained on, of 700 (379 train, 40 val, 90 test, 191 held_out)",
        "homo_sapiens",
        "`is_primary_data == True`",
        "`cafe01`",
        "CL:0000900, CL:0001054",
        "765, `vocabulary.json`",
        model.beta.hash,
        model.vocabulary.hash,
        "460 in both stages (4 + 16 epochs) of 16 cells",
        "temperature 0.2 at the end",
        "from `minilm`, pooling `mean`, trained: `projection`",
        "Not measured.",
        "first 128 tokens",
        "10 cell types",
        "Cell2Sentence",
        "Candidates are needed",
        "names and definitions: CL 2026-01-01: CC BY 4.0",
        "start of the text encoder: `minilm`: Apache-2.0",
        "see their source",
    ):
        assert said in card, said
    assert "MONDO" not in card, "the texts have no disease"
    assert "EFO" not in card
    assert LICENCES.keys() == ONTOLOGIES.keys()


def test_the_front_matter_is_hugging_faces(model: Pretrained, demo: Config, manifest: Manifest) -> None:
    tables = {name: _table(name, "no cell to score" if name == "unseen" else "") for name in TABLES}
    card = trained_card(model, demo, manifest, RECORD, tables)
    data = ModelCard(card).data  # its own parser, and it refuses results that are none
    assert (data.license, data.library_name, data.language) == ("mit", "langcell", "en")
    found = {(r.dataset_type, r.metric_name): r.metric_value for r in data.eval_results or []}
    assert found["seen", "balanced accuracy (ct)"] == 1.0
    assert found["seen", "balanced accuracy (two_step)"] == 0.75
    assert {name for name, _ in found} == TABLES.keys() - {"unseen"}
    assert re.search(r"\| seen \| 4 \| 1\.000 \| 0\.750 \| 0\.500 \| 0\.500 \|", card)
    assert "| unseen | 0 | not measured | not measured | | | no cell to score |" in card
    assert "Not measured." not in card
    bare = ModelCard(trained_card(model, demo, manifest, RECORD)).data
    assert not bare.eval_results


def test_the_card_names_no_place_of_this_machine(
    model: Pretrained, demo: Config, manifest: Manifest, tmp_path: Path
) -> None:
    demo.census.uri = str(tmp_path / "study")
    demo.model.cell_init = str(tmp_path / "Geneformer-12L")
    demo.model.text_init = "michiyasunaga/BioLinkBERT-base"
    demo.beta.source = str(tmp_path / "gene_median_dictionary.pkl")
    demo.text.facets = ["cell_type", "disease", "development_stage"]
    card = trained_card(model, demo, manifest, RECORD)
    assert str(tmp_path) not in card
    assert "cells: `study`: see their source" in card
    assert "start of the cell encoder: `Geneformer-12L`: Apache-2.0" in card
    assert "start of the text encoder: `michiyasunaga/BioLinkBERT-base`: see its source" in card
    assert "non-zero medians, of `gene_median_dictionary.pkl`" in card
    assert "MONDO 2026-01-01: CC BY 4.0" in card
    assert "UBERON 2026-01-01: CC BY 3.0" in card
    demo.census.uri = None
    card = trained_card(model, demo, manifest, RECORD)
    assert f"cells: CELLxGENE Census {demo.census.version}: CC BY 4.0" in card


def test_the_card_of_converted_weights_claims_nothing(model: Pretrained) -> None:
    bare = replace(model, types=TYPES.empty_table(), name="released")
    card = converted_card(bare, "released")
    assert ModelCard(card).data.license == "unknown"
    assert "Not measured." in card
    assert "## Training" not in card
    assert "It was trained on" not in card


def test_an_export_in_the_released_layout_is_whole(model: Pretrained, tmp_path: Path) -> None:
    place = tmp_path / "export"
    model.model.pooling = "cls"
    try:
        official = replace(model, config={**model.config, "pooling": "cls", "layout": "official"})
        write_export(official, place)
        write_export(official, place)  # what stood there is replaced
    finally:
        model.model.pooling = "mean"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    read = Pretrained.from_pretrained(place, device="cpu")
    assert read.beta.hash == model.beta.hash
    assert (place / "ctm_head.bin").exists()
    vocabulary = Vocabulary.from_geneformer(str(place / "token_dictionary.pkl"))
    assert vocabulary.gene_ids == model.vocabulary.gene_ids
    medians = Beta.from_geneformer(str(place / "gene_median_dictionary.pkl"))
    row = {gene: i for i, gene in enumerate(model.beta.feature_id)}
    expected = model.beta.beta[[row[gene] for gene in medians.feature_id]]
    assert sorted(medians.feature_id) == sorted(vocabulary.gene_ids)
    np.testing.assert_array_equal(medians.beta.astype(np.float32), expected)


def test_a_layout_that_cannot_hold_the_model_is_refused_before_training(
    model: Pretrained, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"export\.layout official.*text_pooling cls, not mean"):
        check_models(parse("", DEMO, ["--export.layout=official"]))
    with pytest.raises(InputError, match=r"layout official"):
        write_export(replace(model, config={**model.config, "layout": "official"}), tmp_path / "export")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_a_run_goes_on_with_another_layout() -> None:
    there: dict[str, Any] = {"train": {"lr": 1.0}, "export": {"layout": "official"}}
    assert identity(there) == identity({"train": {"lr": 1.0}})


@pytest.mark.slow
def test_what_a_training_leaves_is_exported_with_its_types(
    ray_session: None, demo_uri: str, demo_corpus: Path, tmp_path: Path
) -> None:
    config, manifest = demo_config(demo_uri, demo_corpus), Manifest.read(str(demo_corpus))
    size = Vocabulary.read(str(demo_corpus / "vocabulary.json")).size
    trained = SimpleNamespace(name="last", record=RECORD, weights={})
    place = export(config, manifest, trained, tmp_path / "export", vocab_size=size)  # type: ignore[arg-type]
    read = Pretrained.from_pretrained(place, device="cpu")
    assert read.types["cells"].to_numpy().sum() == manifest.counts["cells"]["train"]
    assert len(read.known_types()) == 8, "ten, two of them held out"
    assert read.known_types(["blood"]) == read.known_types()
    assert read.beta.hash == manifest.beta_hash
    assert "Not measured." in read.card


@pytest.mark.parametrize("classifies", [True, False])
def test_the_card_of_a_fine_tuned_model_claims_no_figure_of_its_start(
    model: Pretrained, demo: Config, manifest: Manifest, classifies: bool
) -> None:
    start = trained_card(model, demo, manifest, RECORD, {name: _table(name, "") for name in TABLES})
    base = replace(model, name="mine", card=start)
    card = ModelCard(tuned_card(base, "few_shot of type.", classifies=classifies))
    assert not card.data.eval_results
    assert (card.data.license, card.data.tags) == ("mit", ModelCard(start).data.tags)
    own, given = card.text.split("What follows is the card of the model that it comes of.")
    assert own.strip().startswith("# mine, fine-tuned\n\nfew_shot of type.")
    assert ("langcell.predict(" in own, "langcell.annotate(" in own) == (classifies, not classifies)
    assert given.endswith(ModelCard(start).text.strip() + "\n")
    assert ModelCard(tuned_card(replace(base, card=""), "x", classifies=True)).data.library_name == "langcell"
