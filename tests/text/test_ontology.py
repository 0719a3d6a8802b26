"""The look-up on a small release of the tests' own, on real releases, and against the package's data."""

import functools
import gzip
import http.server
import pickle
import threading
import warnings
from collections import Counter
from pathlib import Path

import pronto
import pytest
from cellxgene_ontology_guide.ontology_parser import OntologyParser
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.errors import InputError
from langcell.text.ontology import Ontology, compare
from langcell.text.options import TextOptions
from langcell.text.releases import ONTOLOGIES, read_obo

HUMAN = [name for name in ONTOLOGIES if name != "MmusDv"]
SMALL = Path(__file__).parent / "data" / "cell.obo"
RELEASES = Path(__file__).parents[2].parent / "shared" / "data" / "ontology"
needs_releases = pytest.mark.skipif(not RELEASES.is_dir(), reason="the real releases of ../shared are absent")

EFO_OWL = """<?xml version="1.0"?>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:owl="http://www.w3.org/2002/07/owl#"
    xmlns:rdfs="http://www.w3.org/2000/01/rdf-schema#" xmlns:obo="http://purl.obolibrary.org/obo/">
  <owl:Ontology rdf:about="http://www.ebi.ac.uk/efo/efo.owl">
    <owl:versionIRI rdf:resource="http://www.ebi.ac.uk/efo/releases/v3.0.1/efo.owl"/>
  </owl:Ontology>
  <owl:Class rdf:about="http://www.ebi.ac.uk/efo/EFO_9000001"><rdfs:label>assay</rdfs:label></owl:Class>
  <owl:Class rdf:about="http://www.ebi.ac.uk/efo/EFO_9000002">
    <rdfs:label>droplet assay</rdfs:label>
    <rdfs:subClassOf rdf:resource="http://www.ebi.ac.uk/efo/EFO_9000001"/>
  </owl:Class>
</rdf:RDF>
"""


@pytest.fixture(scope="module")
def small() -> Ontology:
    return Ontology.from_obo([str(SMALL)])


@functools.cache
def cell_ontology() -> Ontology:
    return Ontology.from_obo([str(RELEASES / "cl.v2024-04-05.owl.gz")])


def test_obo_term(small: Ontology) -> None:
    term = small.get("CL:9000002")
    assert term is not None
    assert (term.label, term.definition) == ("red square unit", "A square unit that is red")
    assert term.synonyms == ("shared name",)
    assert term.ancestors == {"CL:9000000", "CL:9000001", "CL:9000010"}, "the last by way of a UBERON term"
    assert small.ancestors("CL:9000003") == {"CL:9000002", *term.ancestors}, "part_of counts"
    assert small.versions == {"CL": "2001-02-03"}


def test_broader_synonyms_and_white_space_stay_out(small: Ontology) -> None:
    square = small.get("CL:9000001")
    assert square is not None
    assert square.synonyms == ("quadrate", "shared name")
    assert square.definition == "A unit with four equal sides.."
    assert small.find("box") is None


def test_terms_come_from_their_own_ontology_alone(small: Ontology) -> None:
    assert small.get("UBERON:9000001") is None
    assert small.find("imported part") is None


@pytest.mark.parametrize(
    ("term_id", "current"),
    [
        ("CL:9000004", "CL:9000001"),  # through CL:9000005, obsolete as well
        ("CL:9000009", "CL:9000001"),  # merged into it: alt_id
        ("CL:9000006", None),  # only `consider`
        ("CL:9000007", None),  # replaced in a circle
    ],
)
def test_obsolete_terms(small: Ontology, term_id: str, current: str | None) -> None:
    term = small.get(term_id)
    assert (term.id if term else None) == current
    assert small.is_obsolete(term_id)
    assert not small.is_obsolete("CL:9000000")
    assert not small.is_obsolete("CL:1")


def test_find(small: Ontology) -> None:
    def found(name: str, within: tuple[str, ...] | None = None) -> str | None:
        term = small.find(name, within)
        return term.id if term else None

    assert found("ROUND unit") == "CL:9000010"
    assert found(" round \n Unit") == "CL:9000010"
    assert found("Quadrate") == "CL:9000001"
    assert found("CL:9000004") == "CL:9000001"
    assert found("shared name") is None, "the synonym of two terms names neither"
    assert found("obsolete circle") is None
    assert found("unit", within=("UBERON",)) is None
    assert found("") is None


def test_related_and_depth(small: Ontology) -> None:
    assert small.related("CL:9000000", "CL:9000002")
    assert small.related("CL:9000002", "CL:9000000")
    assert not small.related("CL:9000001", "CL:9000010")
    assert not small.related("CL:9000001", "CL:9000001")
    assert not small.related("CL:1", "CL:9000001")
    depths = [small.depth(f"CL:900000{n}") for n in (0, 1, 2, 3)]
    assert depths == [0, 1, 2, 3]
    assert small.depth("CL:1") == 0


def test_a_cycle_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "cycle.obo"
    terms = "\n".join(
        f"\n[Term]\nid: CL:{n}\nname: n{n}\nis_a: CL:{above}" for n, above in ((1, 2), (2, 1), (3, 1))
    )
    path.write_text(f"format-version: 1.2\nontology: cl\n{terms}\n")
    ontology = Ontology.from_obo([str(path)])
    assert ontology.ancestors("CL:3") == {"CL:1", "CL:2"}
    assert ontology.depth("CL:3") >= ontology.depth("CL:1")


def test_ids_of_efo_are_curies(tmp_path: Path) -> None:
    path = tmp_path / "efo.owl"
    path.write_text(EFO_OWL)
    ontology = Ontology.from_obo([str(path)])
    assert ontology.versions == {"EFO": "3.0.1"}
    assert ontology.ancestors("EFO:9000002") == {"EFO:9000001"}


def test_compressed_url_equals_file(tmp_path: Path, small: Ontology) -> None:
    (tmp_path / "cell.obo.gz").write_bytes(gzip.compress(SMALL.read_bytes()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        remote = Ontology.from_obo([f"{url}/cell.obo.gz"])
        with pytest.raises(InputError, match=r"/none\.obo: .*404"):
            read_obo(f"{url}/none.obo")
        server.shutdown()
    assert remote.live("CL") == small.live("CL")
    assert compare(remote, small) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("just words\n", "could not find a parser"),
        ("format-version: 1.2\nontology: go\n\n[Term]\nid: GO:1\n", "'go', which is none of CL"),
        ("format-version: 1.2\n\n[Term]\nid: CL:1\n", "ontology None"),
        ("format-version: 1.2\nontology: cl\n\n[Term]\nid: CL:1\nname: !Kung\n", "line 6: .*name: !Kung"),
        (EFO_OWL[:600], "unclosed token: line 9"),
    ],
)
def test_unreadable_file_names_itself_and_the_reason(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "release.obo"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"{path}: .*{reason}"):
        Ontology.from_obo([str(path)])


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "cell.obo.gz"
    path.write_bytes(gzip.compress(SMALL.read_bytes())[:-30])
    with pytest.raises(InputError, match="cannot be read"):
        read_obo(str(path))


def test_two_releases_of_one_ontology() -> None:
    with pytest.raises(InputError, match="more than one release of CL"):
        Ontology.from_obo([str(SMALL), str(SMALL)])


def test_version_of_a_release_that_states_none_is_its_content(tmp_path: Path) -> None:
    text = SMALL.read_text().replace("data-version: releases/2001-02-03/cell.obo\n", "")
    (tmp_path / "a.obo").write_text(text)
    (tmp_path / "b.obo").write_text(text.replace("that is red", "that is blue"))
    (tmp_path / "c.obo").write_text(text.replace("ontology: cl/cell-small", "ontology: cl"))
    a, b, c = (read_obo(str(tmp_path / f"{name}.obo")).version for name in "abc")
    assert a.startswith("content ")
    assert a == c != b


def test_stages_of_life_are_the_organisms_own() -> None:
    human, mouse = Ontology.load(TextOptions()), Ontology.load(TextOptions(), "mus_musculus")
    assert [s for s in mouse.versions if s not in human.versions] == ["MmusDv"]
    stage = mouse.get("MmusDv:0000155")
    assert stage is not None
    assert stage.label == "9-week-old stage"
    assert mouse.find("9-week-old stage", ["HsapDv", "MmusDv"]) is not None
    assert human.find("9-week-old stage", ["HsapDv", "MmusDv"]) is None


def test_given_releases_replace_packaged_ones() -> None:
    ontology = Ontology.load(TextOptions(ontologies=[str(SMALL)]))
    packaged = Ontology.load(TextOptions())
    assert ontology.get("CL:9000001") is not None
    assert ontology.get("CL:0000084") is None
    assert ontology.get("UBERON:0000178") == packaged.get("UBERON:0000178")
    assert list(ontology.versions) == list(packaged.versions) == HUMAN
    assert Ontology.load(TextOptions()) is packaged is Ontology.packaged()


def test_compare_lists_every_kind_of_difference(tmp_path: Path, small: Ontology) -> None:
    changed = SMALL.read_text()
    for old, new in (
        ("name: corner", "name: vertex"),
        ('"A square unit that is red"', '"A square unit that is blue"'),
        ("is_a: CL:9000000 ! unit\n", ""),
        ('synonym: "quadrate" EXACT []\n', ""),
        ("name: Round Unit\n", "name: obsolete Round Unit\nis_obsolete: true\n"),
    ):
        assert old in changed
        changed = changed.replace(old, new)
    path = tmp_path / "changed.obo"
    path.write_text(changed + "\n[Term]\nid: CL:9000020\nname: new\n")
    other = Ontology.from_obo([str(path)])
    found = {(d.id, d.field) for d in compare(small, other)}
    assert found == {
        ("CL:9000001", "ancestors"),
        ("CL:9000001", "synonyms"),
        ("CL:9000002", "ancestors"),
        ("CL:9000002", "definition"),
        ("CL:9000003", "ancestors"),
        ("CL:9000003", "label"),
        ("CL:9000010", "obsolete"),
    }
    assert compare(small, small) == []


def test_packaged_terms_equal_the_package() -> None:
    ontology, parser = Ontology.packaged(), OntologyParser()
    term = ontology.get("CL:0000084")
    assert term is not None
    assert term.label == parser.get_term_label(term.id) == "T cell"
    assert term.definition == parser.get_term_description(term.id)
    assert set(term.synonyms) == set(parser.get_term_synonyms(term.id))
    assert term.ancestors == set(parser.get_term_ancestors(term.id))
    assert ontology.find("T lymphocyte") == term
    assert ontology.find("10x 3' v3", ("EFO",)).id == "EFO:0009922"  # type: ignore[union-attr]
    assert ontology.find("normal", ("MONDO", "PATO")).id == "PATO:0000461"  # type: ignore[union-attr]
    assert ontology.get("AfPO:0000145").label == "Tuareg"  # type: ignore[union-attr]


def test_demo_words_are_ancestors_of_the_demo_types() -> None:
    ontology = Ontology.packaged()
    for word, cell_type in (
        ("CL:0000084", "CL:0000900"),  # T cell > CD8-positive naive T cell
        ("CL:0000766", "CL:0001054"),  # myeloid leukocyte > CD14-positive monocyte
        ("CL:0000945", "CL:0000236"),  # lymphocyte of B lineage > B cell
        ("CL:0001067", "CL:0000623"),  # group 1 innate lymphoid cell > natural killer cell
    ):
        assert word in ontology.ancestors(cell_type)
        assert ontology.depth(word) < ontology.depth(cell_type)


def test_pickled_look_up_is_small_and_equal() -> None:
    data = pickle.dumps(Ontology.load(TextOptions()))
    assert pickle.loads(data).get("CL:0000084") == Ontology.packaged().get("CL:0000084")


@settings(deadline=None)  # the first terms of an ontology wait for it to be read
@given(data=st.data(), ontology=st.sampled_from(HUMAN))
def test_ancestry_is_a_strict_partial_order(data: st.DataObject, ontology: str) -> None:
    look_up = Ontology.packaged()
    term = look_up.get(data.draw(st.sampled_from(sorted(look_up.live(ontology)))))
    assert term is not None
    assert term.id not in term.ancestors
    for ancestor in term.ancestors:
        assert look_up.ancestors(ancestor) < term.ancestors
        assert look_up.depth(ancestor) < look_up.depth(term.id)
        assert look_up.related(term.id, ancestor)
        assert look_up.related(ancestor, term.id)


# --- real releases ------------------------------------------------------------------------------


@needs_releases
@pytest.mark.parametrize(
    ("file", "ontology", "terms"), [("pato.obo", "PATO", 1887), ("hsapdv.obo", "HsapDv", 239)]
)
def test_both_roads_agree_on_one_release(file: str, ontology: str, terms: int) -> None:
    """The package ships these very releases: every field of every term in use is the same."""
    parsed, packaged = Ontology.from_obo([str(RELEASES / file)]), Ontology.packaged()
    assert compare(parsed, packaged) == []
    assert parsed.live(ontology) == packaged.live(ontology)
    assert len(parsed.live(ontology)) == terms
    raw = OntologyParser().cxg_schema.ontology(ontology)
    obsolete = [term_id for term_id, record in raw.items() if record["deprecated"]]
    assert len(obsolete) > 20
    for term_id in obsolete:
        assert parsed.is_obsolete(term_id)
        assert parsed.get(term_id) == packaged.get(term_id)


@needs_releases
def test_hancestro_owl_agrees_with_the_same_release_in_the_package() -> None:
    parsed = Ontology.from_obo([str(RELEASES / "hancestro.owl")])
    assert parsed.versions == {"HANCESTRO": "2025-04-01"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            schema = OntologyParser("7.0.0").cxg_schema  # the schema that pinned this release
    except ValueError:
        pytest.skip("the installed package no longer ships schema 7.0.0")
    raw = schema.ontology("HANCESTRO")
    assert parsed.live("HANCESTRO") == {i for i, record in raw.items() if not record["deprecated"]}
    for term_id in parsed.live("HANCESTRO"):
        term, record = parsed.get(term_id), raw[term_id]
        assert term is not None
        assert term.ancestors == set(record["ancestors"])
        assert term.label == " ".join(record["label"].split())
        assert (term.definition or "") == " ".join(record.get("description", "").split())
        assert term.synonyms == tuple(sorted(record.get("synonyms", ())))


@needs_releases
def test_broken_hancestro_obo() -> None:
    path = RELEASES / "hancestro.obo"
    with pytest.raises(InputError, match=r"hancestro\.obo: .*line 3112: .*name: !Kung"):
        Ontology.from_obo([str(path)])


@pytest.mark.slow
@needs_releases
def test_cell_ontology_owl_and_release_differences() -> None:
    """Two years lie between the file and the package: most terms agree, the differences are listed."""
    parsed, packaged = cell_ontology(), Ontology.packaged()
    assert parsed.versions == {"CL": "2024-04-05"}
    assert len(parsed.live("CL")) == 2746
    differences = compare(parsed, packaged)
    fields = Counter(difference.field for difference in differences)
    shared = len(parsed.live("CL") & packaged.live("CL"))
    assert shared > 0.98 * len(parsed.live("CL"))
    for field, most in (("label", 0.05), ("synonyms", 0.05), ("definition", 0.15)):
        assert 0 < fields[field] < most * shared
    assert parsed.get("CL:0000084") == packaged.get("CL:0000084")
    # the later release puts `eukaryotic cell` above most terms; without it most ancestors are the same
    moved = [d for d in differences if d.field == "ancestors" and d.a != d.b - {"CL:0000255"}]  # type: ignore[operator]
    assert len(moved) < 0.5 * shared


@needs_releases
@pytest.mark.slow
def test_cell_ontology_ancestors_are_is_a_ancestors() -> None:
    """Against pronto's is_a closure: part_of adds `cell` to eight parts of cells, nothing to a cell type."""
    parsed = cell_ontology()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pronto.Ontology(str(RELEASES / "cl.v2024-04-05.owl.gz"), import_depth=0)
    more = {}
    for term_id in parsed.live("CL"):
        above = {t.id for t in reference[term_id].superclasses(with_self=False) if t.id.startswith("CL:")}  # type: ignore[union-attr]
        if above != parsed.ancestors(term_id):
            more[term_id] = parsed.ancestors(term_id) - above
    assert len(more) == 8
    assert all(added == {"CL:0000000"} for added in more.values())
    cells = {i for i in parsed.live("CL") if parsed.related(i, "CL:0000000")} - more.keys()
    assert len(cells) > 2600
