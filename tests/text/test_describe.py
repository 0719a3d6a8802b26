"""Texts: their form, what is left out, and that nothing false or unstable ever gets in."""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.errors import InputError
from langcell.text.describe import FACETS, UNKNOWN, Coverage, candidate, describe, text_id
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

CENSUS = Path(__file__).parents[2].parent / "shared" / "data" / "census"
needs_census = pytest.mark.skipif(not CENSUS.is_dir(), reason="the real obs tables of ../shared are absent")
NAMES = [facet.replace("_", " ") for facet in FACETS]

B_CELL = "A lymphocyte of B lineage that is capable of B cell mediated immunity."
ROW = {
    "cell_type": ("B cell", "CL:0000236"),
    "assay": ("10x 3' v3", "EFO:0009922"),
    "development_stage": ("35-year-old stage", "HsapDv:0000129"),
    "tissue": ("lung", "UBERON:0002048"),
    "tissue_general": ("lung", "UBERON:0002048"),
    "disease": ("influenza || pulmonary fibrosis", "MONDO:0005812 || MONDO:0002771"),
    "sex": ("female", "PATO:0000383"),
    "self_reported_ethnicity": ("unknown", "unknown"),
}


@pytest.fixture(scope="module")
def ontology() -> Ontology:
    return Ontology.packaged()


def one(facet: str, label: object, term_id: object, ontology: Ontology) -> str:
    """The text of a row with one facet, cell type apart."""
    options = TextOptions(facets=["cell_type", facet] if facet != "cell_type" else [facet])
    return describe({facet: (label, term_id)}, ontology, options).text  # type: ignore[dict-item]


def test_full_text(ontology: Ontology) -> None:
    found = describe(ROW, ontology, TextOptions())
    definitions = {}
    for facet in FACETS:
        for term_id in (ROW[facet][1] or "").split(" || "):
            term = ontology.get(term_id)
            if term:
                definitions[facet, term.label] = term.definition
    assert found.text == "".join(
        f"{facet.replace('_', ' ')}: {label}. {text}; " for (facet, label), text in definitions.items()
    )
    assert re.findall(r"(?:^|; )([a-z ]+): ", found.text) == [*NAMES[:6], "disease", "sex"]
    assert found.text.startswith(f"cell type: B cell. {B_CELL}; assay: 10x 3' v3. ")
    assert found.term == "CL:0000236"
    assert found.unresolved == ()
    assert found.text_id == text_id(found.text)


def test_candidate_is_the_cell_type_part_of_a_text(ontology: Ontology) -> None:
    term = ontology.get("CL:0000236")
    assert term is not None
    assert candidate(term) == f"cell type: B cell. {B_CELL}; "
    assert describe(ROW, ontology, TextOptions()).variants[-1] == candidate(term)


def test_options_choose_facets_their_order_and_definitions(ontology: Ontology) -> None:
    options = TextOptions(facets=["tissue", "cell_type"], define=["cell_type"], short_variants=0)
    found = describe(ROW, ontology, options)
    assert found.text == f"tissue: lung; cell type: B cell. {B_CELL}; "
    assert found.variants == ()


@pytest.mark.parametrize(
    "options",
    [
        TextOptions(facets=["cell_type", "organ"]),
        TextOptions(define=["cell type"]),
        TextOptions(facets=["cell_type", "cell_type"]),
        TextOptions(facets=["tissue"]),
    ],
)
def test_options_that_make_no_text(ontology: Ontology, options: TextOptions) -> None:
    with pytest.raises(InputError, match=r"text\.(facets|define): "):
        describe(ROW, ontology, options)


def test_periods_are_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "cl.obo"
    terms = (
        ("1", "a", "Two periods.."),
        ("2", "b", "None at the end"),
        ("3", "c sp.", "One."),
        ("4", "d", "Semi.;"),
    )
    body = "".join(f'\n[Term]\nid: CL:{i}\nname: {name}\ndef: "{text}" []\n' for i, name, text in terms)
    path.write_text(f"format-version: 1.2\nontology: cl\n{body}\n[Term]\nid: CL:5\nname: e\n")
    look_up = Ontology.from_obo([str(path)])
    made = [candidate(term) for i in "12345" if (term := look_up.get(f"CL:{i}"))]
    assert made == [
        "cell type: a. Two periods.; ",
        "cell type: b. None at the end; ",
        "cell type: c sp. One.; ",
        "cell type: d. Semi.; ",
        "cell type: e; ",
    ]


@pytest.mark.parametrize(
    "label", ["unknown", "na", "", None, math.nan, np.nan, pd.NA, pd.NaT, "NaN", "None", " "]
)
@pytest.mark.parametrize("term_id", ["unknown", "na", "", None, math.nan, pd.NA])
def test_values_that_say_nothing_are_left_out(ontology: Ontology, label: object, term_id: object) -> None:
    row = {"cell_type": ("B cell", "CL:0000236"), "sex": (label, term_id)}
    found = describe(row, ontology, TextOptions(facets=["cell_type", "sex"]))  # type: ignore[arg-type]
    assert found.text == f"cell type: B cell. {B_CELL}; "
    assert [value.outcome for value in found.values] == ["defined", "unknown"]
    assert found.unresolved == ()


def test_label_or_id_alone_is_enough(ontology: Ontology) -> None:
    text = f"cell type: B cell. {B_CELL}; "
    for label, term_id in (
        ("B cell", "CL:0000236"),
        ("b CELL", None),
        (None, "CL:0000236"),
        ("B cell", "na"),
    ):
        assert one("cell_type", label, term_id, ontology) == text
    assert one("disease", "acute kidney failure", None, ontology).startswith("disease: acute kidney injury. ")


def test_id_decides_over_a_label_of_another_release(ontology: Ontology) -> None:
    assert (
        one("cell_type", "B cell, as once named", "CL:0000236", ontology) == f"cell type: B cell. {B_CELL}; "
    )


def test_only_the_facets_own_ontologies_are_searched(ontology: Ontology) -> None:
    """`adult stage` is defined as a human's in HsapDv: a mouse's id must not fetch it."""
    assert (
        one("development_stage", "adult stage", "MmusDv:0000110", ontology)
        == "development stage: adult stage; "
    )
    assert one("sex", "B cell", None, ontology) == "sex: B cell; "


@pytest.mark.parametrize(
    ("facet", "label", "term_id", "text", "reason"),
    [
        ("cell_type", "new cell", "CL:9999999", "cell type: new cell; ", "id not in the ontology"),
        ("cell_type", "new cell", None, "cell type: new cell; ", "no term of this name"),
        ("cell_type", None, "CL:9999999", "", "id not in the ontology"),
        ("tissue", "lung (organoid)", "UBERON:0002048 (organoid)", "tissue: lung (organoid); ",
         "id not in the ontology"),
        # obsolete, `consider` only; its label now names a term defined otherwise
        ("development_stage", "infant stage", "HsapDv:0000083", "development stage: infant stage; ",
         "obsolete without replacement"),
        ("cell_type", "blood", "UBERON:0000178", "cell type: blood; ", "id of another ontology"),
        ("cell_type", "T cell", "CL:0000236", "", "label and id differ: T cell"),
        ("disease", "multi || valued", "MONDO:0005812", "disease: multi; disease: valued; ",
         "no term of this name"),
    ],
)  # fmt: skip
def test_unresolved_values_keep_their_name_alone(
    ontology: Ontology, facet: str, label: str | None, term_id: str | None, text: str, reason: str
) -> None:
    options = TextOptions(facets=list(dict.fromkeys(["cell_type", facet])))
    found = describe({facet: (label, term_id)}, ontology, options)
    assert found.text == text
    assert {(f, why) for f, _, why in found.unresolved} == {(facet, reason)}
    assert found.term == ""


def test_a_label_shared_with_another_ontology_is_no_conflict(ontology: Ontology) -> None:
    """UBERON has a `cleavage stage` too; the id's own ontology is the one to ask."""
    assert ontology.find("cleavage stage", ["UBERON"]) is not None
    assert one("development_stage", "cleavage stage", "HsapDv:0000005", ontology) != ""


def test_obsolete_id_is_replaced(ontology: Ontology) -> None:
    found = describe({"development_stage": ("cleavage stage", "HsapDv:0000004")}, ontology, TextOptions())
    assert found.text.startswith("development stage: Carnegie stage 02. ")
    assert [v.id for v in found.values if v.facet == "development_stage"] == ["HsapDv:0000005"]


def test_several_values(ontology: Ontology) -> None:
    def names(facet: str, label: str, term_id: str | None) -> list[str]:
        made = one(facet, label, term_id, ontology)
        return re.findall(rf"(?:^|; ){facet.replace('_', ' ')}: (.*?)[.;]", made)

    assert names("disease", *ROW["disease"]) == ["influenza", "pulmonary fibrosis"]
    assert names("disease", "influenza||pulmonary fibrosis", None) == ["influenza", "pulmonary fibrosis"]
    assert names("disease", "influenza || unknown", "MONDO:0005812 || unknown") == ["influenza"]
    assert names("disease", "influenza || influenza", "MONDO:0005812 || MONDO:0005812") == ["influenza"]
    ethnicity = "self_reported_ethnicity"
    both = names(ethnicity, "European,African", "HANCESTRO:0005,HANCESTRO:0010")
    assert both == ["European ancestry", "African ancestry"], "older labels, the ontology's names"
    comma = "Bengali in Bangladesh"  # a comma in a label is no joint if there is one id
    assert names(ethnicity, f"{comma}, somewhere", "HANCESTRO:9999") == [f"{comma}, somewhere"]


def test_coverage_counts_cells_in_any_order(ontology: Ontology) -> None:
    options = TextOptions(facets=["cell_type", "disease"])
    rows = [
        (ROW, 3),
        ({"cell_type": ("odd", None), "disease": ("unknown", None)}, 2),
        ({"cell_type": ("na", "na")}, 5),
    ]
    forward, backward = Coverage(), Coverage()
    for coverage, ordered in ((forward, rows), (backward, rows[::-1])):
        for row, cells in ordered:
            coverage.add(describe(row, ontology, options), cells)  # type: ignore[arg-type]
    assert forward.to_dict() == backward.to_dict() == {
        "cells": 10,
        "empty": 5,
        "facets": {
            "cell_type": {"defined": 3, "unknown": 5, "unresolved": 2},
            "disease": {"defined": 6, "unknown": 7},
        },
        "unresolved": [
            {"facet": "cell_type", "value": "odd", "reason": "no term of this name", "cells": 2}
        ],
    }  # fmt: skip


def test_text_id_is_a_signed_int64() -> None:
    """Golden: `printf abc | b2sum -l 64` (coreutils) prints d8bb14d833d59559."""
    assert text_id("abc") == np.frombuffer(bytes.fromhex("d8bb14d833d59559"), "<i8")[0]
    assert {np.sign(text_id(str(n))) for n in range(64)} == {-1, 1}


# --- invariants ---------------------------------------------------------------------------------

SAMPLES = {
    "cell_type": [("B cell", "CL:0000236"), ("obsolete", "CL:0000002"), ("T cell", "CL:0000236")],
    "disease": [("normal", "PATO:0000461"), ROW["disease"]],
    "sex": [("male", "PATO:0000384"), ("unknown", "unknown")],
    "tissue": [("blood", "UBERON:0000178"), ("blood", None)],
}
missing = st.sampled_from([None, math.nan, "", "na", "NA", "nan", "None", "unknown", "Unknown", "<NA>"])
free = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
joined = st.lists(free, min_size=2, max_size=3).map(" || ".join)
anything = st.one_of(missing, free, joined)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, tuple[object, object]]:
    row = {}
    for facet in draw(st.sets(st.sampled_from(FACETS))):
        known = st.sampled_from(SAMPLES.get(facet, [ROW[facet]]))
        row[facet] = draw(st.one_of(known, known, st.tuples(anything, anything)))
    return row


@settings(deadline=None, max_examples=300)
@given(
    row=rows(),
    order=st.permutations(FACETS).flatmap(
        lambda names: st.integers(0, 8).map(lambda n: list(dict.fromkeys(["cell_type", *names[:n]])))
    ),
    count=st.integers(0, 6),
)
def test_invariants(row: dict, order: list[str], count: int) -> None:
    ontology, options = Ontology.packaged(), TextOptions(facets=order, short_variants=count)
    found = describe(row, ontology, options)
    again = describe(dict(reversed(row.items())), ontology, options)
    assert found == again
    assert found.text_id == text_id(found.text)
    assert -(2**63) <= found.text_id < 2**63

    stated = [value for value in found.values if value.name]
    assert all(value.name.casefold() not in UNKNOWN for value in stated)
    facets = [value.facet for value in stated]
    assert facets == sorted(facets, key=order.index), "the facets keep their order"
    assert found.text.count("; ") >= len(stated)
    assert bool(found.text) == bool(stated)
    assert "  " not in found.text
    for value in found.values:
        assert (value.outcome in ("defined", "named")) == bool(value.id)
        assert (value.outcome in ("unresolved", "conflict")) == bool(value.reason)

    assert len(found.variants) == count
    cell_type = "".join(
        describe({facet: row[facet] for facet in ("cell_type",) if facet in row}, ontology,
                 TextOptions(facets=["cell_type"])).text
    )  # fmt: skip
    for variant in found.variants:
        sentences = iter(re.split(r"(?<=; )(?=[a-z ]+: )", found.text))
        assert all(part in sentences for part in re.split(r"(?<=; )(?=[a-z ]+: )", variant)), "a subsequence"
        assert cell_type in variant
        if cell_type and len(set(facets)) > 1:
            assert len(variant) < len(found.text), "at least one facet dropped"
    if count:
        assert found.variants[-1] == (cell_type or found.text)


def test_variants_drop_each_facet_about_half_of_the_time(ontology: Ontology) -> None:
    kept: Counter[str] = Counter()
    ages = range(20, 80)
    for age in ages:
        row = {**ROW, "development_stage": (f"{age}-year-old stage", None)}
        for variant in describe(row, ontology, TextOptions(short_variants=9)).variants[:-1]:
            kept.update({name for name in NAMES if re.search(rf"(^|; ){name}: ", variant)})
    drawn = len(ages) * 8
    assert kept["cell type"] == drawn
    for name in NAMES[1:7]:
        assert 0.4 * drawn < kept[name] < 0.6 * drawn


def test_same_texts_in_any_process(ontology: Ontology) -> None:
    code = (
        "from langcell.text.describe import describe; from langcell.text.ontology import Ontology\n"
        "from langcell.text.options import TextOptions\n"
        f"found = describe({ROW!r}, Ontology.packaged(), TextOptions())\n"
        "print(repr((found.text, found.variants, found.text_id)))"
    )
    here = describe(ROW, ontology, TextOptions())
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == repr((here.text, here.variants, here.text_id))


# --- real obs -----------------------------------------------------------------------------------


def describe_table(file: str, ontology: Ontology) -> tuple[pd.DataFrame, Coverage, list[str]]:
    table = pd.read_csv(CENSUS / file, sep="\t", keep_default_na=False)
    coverage, texts = Coverage(), []
    for row in table.to_dict("records"):
        pairs = {f: (row[f], row.get(f"{f}_ontology_term_id")) for f in FACETS if f in row}
        found = describe(pairs, ontology, TextOptions())
        coverage.add(found)
        texts.append(found.text)
        stated = {value.facet for value in found.values if value.name}
        spoken = {f for f in pairs if any(p.strip().casefold() not in UNKNOWN for p in row[f].split("||"))}
        assert stated == spoken, "what obs says stands in the text, and nothing else"
        for facet in spoken:
            assert f"{facet.replace('_', ' ')}: " in found.text
        assert not re.search(r": (None|nan|unknown|na)[.;]", found.text)
        assert not re.search(r"\.\.; |;; |  |\|\|", found.text)
    return table, coverage, texts


@needs_census
def test_five_thousand_real_rows(ontology: Ontology) -> None:
    table, coverage, texts = describe_table("census_obs_sample.tsv.gz", ontology)
    assert len(table) == coverage.cells == 5000
    assert coverage.empty == 0
    assert not coverage.unresolved
    columns = [facet for facet in FACETS if facet in table]
    assert len(columns) == 7
    assert all(coverage.facets[facet] == {"defined": 5000} for facet in columns)
    assert coverage.facets["self_reported_ethnicity"] == {"unknown": 5000}
    assert len(set(texts)) == len(table[columns].drop_duplicates())


@needs_census
def test_donor_rows_without_ids(ontology: Ontology) -> None:
    """The counts of unknown and of joined values are pandas's."""
    table, coverage, texts = describe_table("donor_meta.tsv.gz", ontology)
    assert coverage.cells == len(table) == 19227
    for facet in ("sex", "development_stage"):
        assert coverage.facets[facet]["unknown"] == (table[facet] == "unknown").sum() > 0
        assert coverage.facets[facet]["defined"] == (table[facet] != "unknown").sum()
    diseases = table["disease"].str.split("||", regex=False).str.len()
    assert (diseases > 1).sum() > 1000
    assert sum(coverage.facets["disease"].values()) == diseases.sum()
    assert len(set(texts)) == len(table[[f for f in FACETS if f in table]].drop_duplicates()) == 11260
    resolved = sum(counts["defined"] for counts in coverage.facets.values())
    assert coverage.unresolved.total() < 0.001 * resolved
