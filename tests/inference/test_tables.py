import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.options import EvalOptions
from langcell.inference.scoring import zero_shot
from langcell.inference.tables import TABLES, EvalCells, measures, plan_tables, tokenize, zero_shot_tables
from langcell.text.describe import candidate

# A small tree of cell types: two lineages; leaves B1..B3 and T1..T3, both held out in part.
PARENTS = {
    "CL:root": [],
    "CL:B": ["CL:root"],
    "CL:T": ["CL:root"],
    "CL:B1": ["CL:B"],
    "CL:B2": ["CL:B"],
    "CL:B3": ["CL:B"],
    "CL:T1": ["CL:T"],
    "CL:T2": ["CL:T"],
    "CL:T3": ["CL:T"],
    "CL:BT": ["CL:B", "CL:T"],
}
TRAIN = ["CL:B1", "CL:B2", "CL:T1", "CL:T2", "CL:BT"]
HELD_OUT = ["CL:B3", "CL:T3"]


@pytest.fixture
def make(toy):
    def build(terms: dict[str, list[str]], **options):
        rng = np.random.default_rng(0)
        term = [t for split in terms for t in terms[split]]
        split = [split for split in terms for _ in terms[split]]
        sentences = [rng.integers(0, 50, n) for n in rng.integers(3, 20, len(term))]
        cells = EvalCells(Packed.from_sequences(sentences), term, split, TRAIN, set(TRAIN))
        return cells, toy.Ontology(PARENTS), EvalOptions(**{"new_words": ["CL:B", "CL:T"], **options})

    return build


@pytest.fixture
def score(toy):
    def run(cells, ontology, options, two_step=True):
        return zero_shot_tables(
            toy.Model(), toy.Tokenizer(), cells, ontology, options, tau=0.05, max_length=40, two_step=two_step
        )

    return run


SPLITS = {
    "test": ["CL:B1"] * 6
    + ["CL:T1"] * 3
    + ["CL:T2"] * 2
    + ["CL:BT"] * 4
    + ["CL:new"]
    + [""] * 2
    + ["CL:root"],
    "held_out": ["CL:B3"] * 7 + ["CL:T3"] * 5 + ["CL:B1"] * 2 + [""],
}


def test_which_cells_and_candidates_each_table_has(make):
    cells, ontology, options = make(SPLITS)
    tables = plan_tables(cells, ontology, options)
    assert list(tables) == ["seen", "unseen", "new_words", "new_words_seen", "generalised"]
    everything = tuple(sorted(TRAIN + HELD_OUT))
    expected = {
        # name: candidates, own types with their right answers, unscored
        "seen": (everything, {t: t for t in ("CL:B1", "CL:T1", "CL:T2", "CL:BT")},
                 {"no ontology term": 2, "no training cell of the type": 2}),
        "unseen": (("CL:B3", "CL:T3"), {"CL:B3": "CL:B3", "CL:T3": "CL:T3"},
                   {"no ontology term": 1, "type of training cells": 2}),
        "new_words": (("CL:B", "CL:T"), {"CL:B3": "CL:B", "CL:T3": "CL:T"},
                      {"no ontology term": 1, "type of training cells": 2}),
        "new_words_seen": (("CL:B", "CL:T"), {"CL:B1": "CL:B", "CL:T1": "CL:T", "CL:T2": "CL:T"},
                           {"no ontology term": 2, "no training cell of the type": 2,
                            "several candidates are ancestors": 4}),
        "generalised": (everything, {"CL:B3": "CL:B3", "CL:T3": "CL:T3"},
                        {"no ontology term": 1, "type of training cells": 2}),
    }  # fmt: skip
    for name, (candidates, right, unscored) in expected.items():
        table = tables[name]
        assert table.candidates == candidates
        assert table.unscored == unscored
        assert {cells.split[row] for row in table.rows} == {TABLES[name]}
        assert [cells.term[row] for row in table.rows] == list(table.types)
        assert {t: candidates[i] for t, i in zip(table.types, table.truth, strict=True)} == right
        assert len(table.rows) + sum(unscored.values()) == cells.split.count(TABLES[name])


def test_answers_are_those_of_zero_shot(make, score, toy):
    cells, ontology, options = make(SPLITS, top_k=3, a=0.3)
    for table in score(cells, ontology, options).values():
        texts = tokenize(toy.Tokenizer(), [candidate(ontology.get(t)) for t in table.candidates], 40)
        own = cells.packed.select(torch.from_numpy(table.rows))
        alone = zero_shot(toy.Model(), own, texts, tau=0.05, a=0.3, top_k=3, batch_tokens=10_000)
        np.testing.assert_array_equal(table.predicted["ct"], alone.ct_NC.argmax(1))
        np.testing.assert_array_equal(table.predicted["two_step"], alone.two_step_NC.argmax(1))


def test_the_lazy_answers(make, score):
    table = score(*make(SPLITS))["new_words_seen"]
    # 6 B1 cells under B; 3 T1 and 2 T2 cells under T: the best constant answers B.
    assert table.chance == 1 / 2
    assert table.constant["accuracy"] == pytest.approx(6 / 11)
    assert table.constant["balanced_accuracy"] == pytest.approx(1 / 2)
    assert table.constant["macro_f1"] == pytest.approx((2 * 6 / (11 + 6)) / 2)
    generalised = score(*make(SPLITS))["generalised"]
    assert generalised.chance == 1 / 7  # of seven candidates, though a constant gets half of two types
    assert generalised.constant["balanced_accuracy"] == pytest.approx(1 / 2)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1))
@pytest.mark.filterwarnings("ignore::UserWarning")  # scikit-learn on classes that one side lacks
def test_balanced_accuracy_is_over_the_types_that_occur(pairs):
    truth, predicted = np.array(pairs).T
    measured = measures(truth, predicted)
    assert measured["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert measured["accuracy"] == pytest.approx(np.mean(truth == predicted))


def test_the_confusion_counts_every_cell_by_its_own_type(make, score):
    table = score(*make(SPLITS))["new_words_seen"]
    types, counts = table.confusion("ct")
    assert types == ["CL:B1", "CL:T1", "CL:T2"]
    assert counts.shape == (3, 2)
    assert counts.sum(1).tolist() == [6, 3, 2]
    right = counts[0, 0] + counts[1, 1] + counts[2, 1]
    assert right / 11 == pytest.approx(table.measures("ct")["accuracy"])


def test_the_stable_keys(make, score):
    tables = score(*make(SPLITS))
    tables["seen"] = replace(
        tables["seen"], baseline={"accuracy": 0.9, "balanced_accuracy": 0.8, "macro_f1": 0.7}
    )
    keys = {"accuracy", "balanced_accuracy", "macro_f1", "chance", "constant", "n"}
    for name, table in tables.items():
        result = json.loads(json.dumps(table.to_dict()))
        for method in ("ct", "two_step"):
            assert set(result[method]) == keys | ({"baseline"} if name == "seen" else set())
            assert result[method]["n"] == len(table.rows)
            assert result[method]["accuracy"] == table.measures(method)["accuracy"]
    during_training = score(*make(SPLITS), two_step=False)
    assert "two_step" not in during_training["seen"].to_dict()


@pytest.mark.parametrize(
    ("splits", "options", "why"),
    [
        ({}, {}, ["no cell", "0 candidates", "no cell", "no cell", "no cell"]),
        ({"test": ["CL:B1"]}, {}, ["", "0 candidates", "no cell", "", "no cell"]),
        ({"held_out": ["CL:B3"]}, {}, ["no cell", "1 candidate,", "", "no cell", ""]),
        ({"held_out": [""] * 3}, {"held_out_types": ["CL:B3", "cl:t3"]}, ["no cell"] * 5),
        (SPLITS, {"new_words": ["CL:B"]}, ["", "", "1 candidate,", "1 candidate,", ""]),
    ],
)
def test_an_empty_table_says_why(make, score, splits, options, why):
    tables = score(*make(splits, **options))
    for table, reason in zip(tables.values(), why, strict=True):
        result = json.loads(json.dumps(table.to_dict()))
        assert table.empty.startswith(reason)
        assert bool(table.empty) == bool(reason)
        assert (result["ct"]["n"] == 0) == bool(reason)
        for key in ("accuracy", "balanced_accuracy", "macro_f1", "chance", "constant"):
            assert (result["two_step"][key] is None) == bool(reason)


def test_a_large_split_is_sampled_the_same_way_every_time(make, score):
    large = {"test": ["CL:B1", "CL:T1"] * 40, "held_out": ["CL:B3", "CL:T3"] * 30}
    cells, ontology, options = make(large, max_cells=25)
    tables = score(cells, ontology, options)
    for name, table in tables.items():
        assert len(table.rows) == 25
        assert (np.diff(table.rows) > 0).all()
        assert table.unscored["not in the sample"] == cells.split.count(TABLES[name]) - 25
    assert tables["seen"].rows.tolist() == tables["new_words_seen"].rows.tolist()
    again = plan_tables(cells, ontology, options)
    assert again["unseen"].rows.tolist() == tables["unseen"].rows.tolist()
    other = plan_tables(cells, ontology, options, seed=1)
    assert other["unseen"].rows.tolist() != tables["unseen"].rows.tolist()


def test_held_out_types_are_known_to_the_ontology(make):
    with pytest.raises(InputError, match=r"held_out_types: 'no such cell'"):
        plan_tables(*make(SPLITS, held_out_types=["no such cell"]))
