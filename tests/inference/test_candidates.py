"""What a user names becomes the text that training used, or is taken at its word, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from langcell.errors import InputError
from langcell.inference.candidates import Candidate, read_candidates, read_file
from langcell.text.ontology import Ontology


@pytest.fixture(scope="module")
def ontology() -> Ontology:
    return Ontology.packaged()


def test_names_ids_and_synonyms_are_the_same_sentence(ontology: Ontology) -> None:
    by_name, other = read_candidates(["b cell", "neuron"], ontology)
    by_id, _ = read_candidates(["CL:0000236", "CL:0000540"], ontology)
    by_synonym, _ = read_candidates(["B lymphocyte", "nerve cell"], ontology)
    assert by_name == by_id == by_synonym
    assert by_name.label == "B cell"
    assert by_name.term == "CL:0000236"
    assert by_name.text.startswith("cell type: B cell. A lymphocyte of B lineage")
    assert by_name.text.endswith("; ")
    assert other.term == "CL:0000540"


def test_free_text_is_taken_at_its_word(ontology: Ontology) -> None:
    words = "a T cell that has lost its way"
    free, mapped = read_candidates([words, "B cell"], ontology)
    assert free == Candidate(words, words)
    lost, own = read_candidates({"lost": words, "B": "CL:0000236"}, ontology)
    assert (lost.label, lost.text, lost.term) == ("lost", words, "")
    assert (own.label, own.text, own.term) == ("B", mapped.text, mapped.term)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["B cell"], "1 given"),
        ([], "0 given"),
        (["CL:9999999", "B cell"], "CL:9999999 is not a term of the cell ontology;"),
        (["UBERON:0000178", "B cell"], "UBERON:0000178 is not a term of the cell ontology"),
        (["B cell", "CL:0000236"], r"B cell \(B cell\) stands twice"),
        ({"one": "B cell", "two": "CL:0000236"}, r"two \(CL:0000236\) stands twice"),
        ({"one": "B cell", "two": "   ", "three": "neuron"}, "'   ' of 'two' is no text"),
        (["B cell", "", "neuron"], "'' is no text"),
    ],
)
def test_what_is_no_choice_is_refused(ontology: Ontology, given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_candidates(given, ontology)  # type: ignore[arg-type]


def test_an_obsolete_id_means_its_replacement_or_is_refused(ontology: Ontology) -> None:
    gone = [f"CL:{number:07d}" for number in range(1, 700) if ontology.is_obsolete(f"CL:{number:07d}")]
    replaced = next(term for term in gone if ontology.get(term) is not None)
    first, _ = read_candidates([replaced, "neuron"], ontology)
    assert first.term not in ("", replaced)
    without = next(term for term in gone if ontology.get(term) is None)
    with pytest.raises(InputError, match=r"any more \(it is obsolete\)"):
        read_candidates([without, "neuron"], ontology)


def test_files_have_one_column_or_two(tmp_path: Path) -> None:
    file = tmp_path / "candidates.tsv"
    file.write_text("# blood\nB cell\n\nCL:0000540\n")
    assert read_file(file) == ["B cell", "CL:0000540"]
    file.write_text("B\tCL:0000236\nodd\ta cell, that is all\n")
    assert read_file(file) == {"B": "CL:0000236", "odd": "a cell, that is all"}
    file.write_text("B\tCL:0000236\nneuron\n")
    with pytest.raises(InputError, match="every line two"):
        read_file(file)
    file.write_text("B\tCL:0000236\nB \tneuron\n")
    with pytest.raises(InputError, match="a label twice"):
        read_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "absent.txt")
