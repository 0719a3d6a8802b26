import pytest
from hypothesis import given
from hypothesis import strategies as st

from langcell.errors import InputError
from langcell.inference.new_words import new_words, only_ancestor
from langcell.text.ontology import Ontology

DEMO = {
    "CL:0000451", "CL:0001054", "CL:0000236", "CL:0000792", "CL:0000794",
    "CL:0000900", "CL:0000623", "CL:0000897", "CL:0008001", "CL:0000895",
}  # fmt: skip
DEMO_HELD_OUT = {"CL:0000900", "CL:0001054"}
DEMO_WORDS = ["CL:0000084", "CL:0000766", "CL:0000945", "CL:0001067"]


@st.composite
def dags(draw):
    """A random ontology (a term's parents come before it), its types and those read in training."""
    size = draw(st.integers(1, 25))
    ids = [f"CL:{i:02d}" for i in range(size)]
    parents = {
        ids[i]: draw(st.lists(st.sampled_from(ids[:i]), max_size=3, unique=True)) if i else []
        for i in range(size)
    }
    types = draw(st.sets(st.sampled_from(ids), min_size=1))
    return parents, types, draw(st.sets(st.sampled_from(sorted(types))))


@given(dags())
def test_the_rule_on_any_ontology(toy, case):
    parents, types, text_terms = case
    ontology = toy.Ontology(parents)
    words = new_words(ontology, types, text_terms, None)
    below = {word: {t for t in types if word in ontology.ancestors(t)} for word in parents}
    for i, word in enumerate(words):
        assert word not in text_terms
        assert 1 <= len(below[word]) <= len(types) / 2
        for other in words[:i]:
            assert not ontology.related(word, other)
            assert not below[word] & below[other]
    # Greedy: whatever was left out was clashing with one that goes before it.
    key = {word: (-len(below[word]), -ontology.depth(word), word) for word in parents}
    assert words == sorted(words, key=key.__getitem__)
    for word in set(parents) - set(words) - text_terms:
        if 1 <= len(below[word]) <= len(types) / 2:
            assert any(
                key[other] < key[word] and (ontology.related(word, other) or below[word] & below[other])
                for other in words
            )
    assert words == new_words(ontology, sorted(types, reverse=True), text_terms, None)


@given(dags())
def test_only_ancestor_is_the_only_one(toy, case):
    parents, types, words = case
    ontology = toy.Ontology(parents)
    for term in types:
        above = [word for word in words if word in ontology.ancestors(term)]
        assert only_ancestor(term, words, ontology) == (above[0] if len(above) == 1 else None)


def test_the_rule_on_the_demo():
    """The ten types of the demo; covers 5, 2, 1 and 1 of them, as read off the packaged ontology."""
    ontology = Ontology.packaged()
    words = new_words(ontology, DEMO, DEMO - DEMO_HELD_OUT, None)
    labels = [term.label for term in map(ontology.get, words) if term]
    assert labels[:2] == ["mature alpha-beta T cell", "mononuclear phagocyte"]
    assert set(labels[2:]) == {"group 1 innate lymphoid cell", "lymphocyte of B lineage"}
    below = {word: {t for t in DEMO if word in ontology.ancestors(t)} for word in words}
    assert [len(below[word]) for word in words] == [5, 2, 1, 1]


def test_the_pinned_words_of_the_demo():
    ontology = Ontology.packaged()
    assert new_words(ontology, DEMO, DEMO - DEMO_HELD_OUT, DEMO_WORDS) == DEMO_WORDS
    right = {term: only_ancestor(term, DEMO_WORDS, ontology) for term in DEMO}
    assert right["CL:0000900"] == "CL:0000084"  # naive CD8 T: T cell
    assert right["CL:0001054"] == "CL:0000766"  # CD14 monocyte: myeloid leukocyte
    assert right["CL:0000451"] is right["CL:0008001"] is None  # dendritic cell and CD34+: none of the four


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (["CL:0000084", "CL:9999999"], "CL:9999999"),
        (["CL:0000236"], "CL:0000236 is the cell type of a training text"),
        (["CL:0000084", "CL:0000542"], "CL:0000084 and CL:0000542 is an ancestor"),
    ],
)
def test_words_that_cannot_serve_are_refused(fixed, message):
    with pytest.raises(InputError, match=message):
        new_words(Ontology.packaged(), DEMO, DEMO - DEMO_HELD_OUT, fixed)
