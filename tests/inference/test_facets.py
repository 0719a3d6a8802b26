"""Labels become terms by the rules of training texts, and a facet's table is the argmax of its scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.embed import tokenize
from langcell.inference.facets import resolve, zero_shot_facets
from langcell.inference.pretrained import Pretrained
from langcell.inference.scoring import zero_shot
from langcell.text.ontology import Ontology

ONTOLOGY = Ontology.packaged()


def test_candidates_are_the_released_sentences_of_each_facet() -> None:
    tissue = resolve("tissue", ["blood", "lung"], None, {}, ONTOLOGY)
    assert tissue.term_N == ("UBERON:0000178", "UBERON:0002048")
    for term_id, text in tissue.texts.items():
        term = ONTOLOGY.get(term_id)
        assert term is not None
        assert text == f"tissue: {term.label}. {term.definition}; "
    stage = resolve("development_stage", ["HsapDv:0000258"], None, {}, ONTOLOGY)
    assert stage.texts["HsapDv:0000258"].startswith("development stage: adult stage. ")
    cell = resolve("cell_type", ["B cell"], None, {}, ONTOLOGY)
    assert cell.texts["CL:0000236"].startswith("cell type: B cell. A lymphocyte of B lineage")


def test_a_label_is_a_name_a_synonym_an_id_or_what_the_user_says() -> None:
    labels = ["B cell", "b CELL", "CL:0000236", "B lymphocyte", "my B", "B cell"]
    found = resolve("cell_type", labels, None, {"my B": "CL:0000236"}, ONTOLOGY)
    assert found.term_N == ("CL:0000236",) * 6
    assert found.labels == {"CL:0000236": "B cell"}
    assert found.left_out == {}


def test_an_id_column_decides_and_what_the_user_states_before_it() -> None:
    found = resolve("cell_type", ["x", "y"], ["CL:0000236", "CL:0000236"], {"y": "CL:0000084"}, ONTOLOGY)
    assert found.term_N == ("CL:0000236", "CL:0000084")


def test_cells_without_a_term_are_left_out_and_counted() -> None:
    labels = ["CD19+ B", "B cell", None, "CD19+ B", float("nan"), "unknown"]
    found = resolve("cell_type", labels, None, {}, ONTOLOGY)
    assert found.term_N == ("", "CL:0000236", "", "", "", "")
    assert found.rows.tolist() == [1]
    assert found.left_out["CD19+ B: no term of this name"] == 2
    assert sum(found.left_out.values()) == 5


def test_several_diseases_of_one_cell_are_no_single_answer() -> None:
    found = resolve("disease", ["influenza || pneumonia", "pneumonia"], None, {}, ONTOLOGY)
    assert found.term_N[0] == ""
    assert found.left_out == {"influenza || pneumonia: several values": 1}


def test_faults_of_the_user_are_named() -> None:
    with pytest.raises(InputError, match="organ' is no facet; they are cell_type, assay"):
        resolve("organ", ["blood"], None, {}, ONTOLOGY)
    with pytest.raises(InputError, match="'my B' is said to be 'UBERON:0000178', which is no id of CL"):
        resolve("cell_type", ["my B"], None, {"my B": "UBERON:0000178"}, ONTOLOGY)


@pytest.fixture(scope="module")
def model(export: Path) -> Pretrained:
    return Pretrained.from_pretrained(export, "cpu")


def _cells(model: Pretrained, n: int) -> Packed:
    random = np.random.default_rng(0)
    genes = [random.permutation(len(model.vocabulary.gene_ids))[:20] + 2 for _ in range(n)]
    return Packed.from_sequences([np.concatenate([[model.vocabulary.cls], of]) for of in genes])


def test_tables_are_the_answers_of_separate_questions(model: Pretrained) -> None:
    cells = _cells(model, 6)
    types = resolve(
        "cell_type", ["B cell", "T cell", "?", "monocyte", "B cell", "T cell"], None, {}, ONTOLOGY
    )
    tissue = resolve("tissue", ["blood", "lung", "lung", "blood", "spleen", "?"], None, {}, ONTOLOGY)
    two = types.only(["CL:0000236", "CL:0000084"])
    asked = {"cell_type": types, "tissue": tissue, "two": two}
    tables = zero_shot_facets(model, cells, asked, a=0.1, top_k=2, batch_tokens=4096)
    for name, facet in asked.items():
        table = tables[name]
        rows = np.flatnonzero(np.array(facet.term_N) != "")
        assert table.rows.tolist() == rows.tolist()
        assert table.candidates == tuple(sorted(set(facet.term_N) - {""}))
        assert [table.candidates[i] for i in table.truth] == [facet.term_N[row] for row in rows]
        texts = [facet.texts[term] for term in table.candidates]
        alone = zero_shot(
            model.model,
            cells,
            tokenize(model.tokenizer, texts, model.text.max_length),
            tau=model.tau,
            a=0.1,
            top_k=2,
            batch_tokens=4096,
        )
        assert alone.two_step_NC is not None
        np.testing.assert_array_equal(table.predicted["ct"], alone.ct_NC.argmax(1)[rows])
        np.testing.assert_array_equal(table.predicted["two_step"], alone.two_step_NC.argmax(1)[rows])
    assert tables["two"].candidates == ("CL:0000084", "CL:0000236")
    assert len(tables["two"].rows) == 4


def test_a_facet_of_one_value_is_an_empty_table(model: Pretrained) -> None:
    blood = resolve("tissue", ["blood"] * 3, None, {}, ONTOLOGY)
    tables = zero_shot_facets(model, _cells(model, 3), {"tissue": blood}, a=0.1, top_k=2, batch_tokens=4096)
    found = tables["tissue"].to_dict()
    assert found["empty"] == "1 candidate, at least two are needed"
    assert found["ct"]["accuracy"] is None
