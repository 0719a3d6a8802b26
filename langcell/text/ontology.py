"""One look-up of ontology terms: label, definition, exact synonyms, ancestors.

Eight ontologies name everything that stands in a text (`releases.ONTOLOGIES`); `releases` reads them,
and says what an ancestor is. Terms are made when they are asked for: a Census needs some thousands of
the 74k, so a first look-up costs the reading of one ontology (CL 0.02 s, MONDO 0.4 s) and not of all.

Obsolete terms are never handed out. `get` follows `replaced_by` (the curators' statement that the
replacement may be put in automatically) as long as it leads, across ontologies too, to a term in use;
`consider` (candidates for a human to choose from) is not followed. An obsolete label is not found, so
a label that an obsolete and a new term share (HsapDv `adult stage`) means the new one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from langcell.errors import InputError
from langcell.text.options import TextOptions
from langcell.text.releases import ONTOLOGIES, STAGES_OF, Packaged, Record, Release, read_obo


@dataclass(frozen=True, slots=True)
class Term:
    """A term in use. White space of the three texts is normalised to single spaces."""

    id: str
    label: str
    definition: str | None
    synonyms: tuple[str, ...]
    """Exact synonyms, sorted."""
    ancestors: frozenset[str]
    """Ids of all terms of the same ontology above this one (is_a and part_of), without itself."""


class _Names:
    """Where the names of one release's terms in use lead. A name of two terms leads nowhere."""

    def __init__(self, records: Iterable[tuple[str, Record]]) -> None:
        live = [(i, r) for i, r in records if not r.get("deprecated") and r.get("label")]
        self.labels = _unambiguous((_text(r["label"]), i) for i, r in live)
        self.folded = _unambiguous((_text(r["label"]).casefold(), i) for i, r in live)
        self.synonyms = _unambiguous((_text(s).casefold(), i) for i, r in live for s in r.get("synonyms", ()))

    def label(self, name: str) -> str | None:
        return self.labels.get(name) or self.folded.get(name.casefold())


class Ontology:
    """Terms of several ontologies under one roof.

    Args:
        releases: at most one per ontology. Their order is the order in which names are looked for.
    """

    def __init__(self, releases: Sequence[Release]) -> None:
        self._releases = {release.ontology: release for release in releases}
        if len(self._releases) < len(releases):
            names = [release.ontology for release in releases]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"more than one release of {', '.join(twice)} given; give one")
        self._home = {prefix: r for r in releases for prefix in ONTOLOGIES[r.ontology]}
        self._terms: dict[str, Term] = {}
        self._names: dict[str, _Names] = {}
        self._depths: dict[str, int] = {}

    @classmethod
    def packaged(cls) -> "Ontology":
        """The releases that `cellxgene-ontology-guide` ships; one object per process, no network."""
        return _load((), "homo_sapiens")

    @classmethod
    def from_obo(cls, sources: Iterable[str]) -> "Ontology":
        """Releases of the OBO Foundry alone, parsed anew: paths or URLs as in `releases.read_obo`.

        Raises:
            InputError: a file that cannot be read (names it and the reason), or an ontology given twice.
        """
        return cls([read_obo(source) for source in sources])

    @classmethod
    def load(cls, options: TextOptions, organism: str = "homo_sapiens") -> "Ontology":
        """What the options ask for; one object per process, list of releases and organism.

        Each release in `options.ontologies` takes the place of the packaged release of its ontology. Of the
        stages of life only the organism's own are loaded: a label such as `adult stage` is several species'.
        """
        return _load(tuple(options.ontologies), organism)

    @property
    def versions(self) -> dict[str, str]:
        """Release of each ontology, e.g. `{"CL": "2026-03-26"}`; a hash of its content if it states none."""
        return {name: release.version for name, release in self._releases.items()}

    def get(self, term_id: str) -> Term | None:
        """The term in use behind an id, its replacement if it is obsolete, or None."""
        term_id = self._current(term_id)
        if not term_id:
            return None
        if term_id not in self._terms:
            record = self._home[_prefix(term_id)].records[term_id]
            self._terms[term_id] = Term(
                id=term_id,
                label=_text(record["label"]),
                definition=_text(record.get("description", "")) or None,
                synonyms=tuple(sorted({_text(s) for s in record.get("synonyms", ())})),
                ancestors=frozenset(record["ancestors"]),
            )
        return self._terms[term_id]

    def find(self, name: str, within: Iterable[str] | None = None) -> Term | None:
        """The term that an id, a label or an exact synonym names.

        Labels go before synonyms in every ontology; case is ignored where that leaves one term. A
        name that two terms of an ontology share finds neither.

        Args:
            name: id, label or exact synonym.
            within: ontologies (keys of `ONTOLOGIES`) to look in, in this order. None: all.
        """
        searched = [o for o in (self._releases if within is None else within) if o in self._releases]
        if self.covers(name, searched):
            return self.get(name)
        name = _text(name)
        by_label = (self._index(ontology).label(name) for ontology in searched)
        by_synonym = (self._index(ontology).synonyms.get(name.casefold()) for ontology in searched)
        found = next(filter(None, by_label), None) or next(filter(None, by_synonym), None)
        return self.get(found) if found else None

    def covers(self, term_id: str, within: Iterable[str]) -> bool:
        """Whether an id has the form of the terms of one of the ontologies `within` (it may be unknown)."""
        return any(_prefix(term_id) in ONTOLOGIES[ontology] for ontology in within)

    def is_obsolete(self, term_id: str) -> bool:
        """Whether an id is that of an obsolete term; False too if it is unknown."""
        record = self._record(term_id)
        return record is not None and bool(record.get("deprecated"))

    def ancestors(self, term_id: str) -> frozenset[str]:
        """Ids of the terms above a term, without itself; empty if the id is unknown."""
        term = self.get(term_id)
        return term.ancestors if term else frozenset()

    def related(self, a: str, b: str) -> bool:
        """Whether one of two terms is an ancestor of the other; False for a term and itself."""
        return a in self.ancestors(b) or b in self.ancestors(a)

    def depth(self, term_id: str) -> int:
        """Length of the longest chain of ancestors above a term (edges); 0 at a root or if unknown."""
        if term_id not in self._depths:
            above = self.ancestors(term_id)
            # strictly fewer ancestors at each step: a cycle in a faulty release cannot hold us
            chains = (1 + self.depth(a) for a in above if self.ancestors(a) < above)
            self._depths[term_id] = max(chains, default=0)
        return self._depths[term_id]

    def live(self, ontology: str) -> frozenset[str]:
        """Ids of all terms in use of one ontology; empty if it is not loaded."""
        if ontology not in self._releases:
            return frozenset()
        records = self._releases[ontology].records
        return frozenset(i for i, record in records.items() if not record.get("deprecated"))

    def _record(self, term_id: str) -> Record | None:
        release = self._home.get(_prefix(term_id))
        return release.records.get(term_id) if release else None

    def _current(self, term_id: str) -> str:
        """The id in use that replaces an id, the id itself if it is in use, else an empty string."""
        seen: set[str] = set()
        while term_id not in seen:
            seen.add(term_id)
            record = self._record(term_id)
            if record is None:
                return ""
            if not record.get("deprecated"):
                return term_id if record.get("label") else ""
            term_id = record.get("replaced_by", "")
        return ""

    def _index(self, ontology: str) -> _Names:
        if ontology not in self._names:
            self._names[ontology] = _Names(self._releases[ontology].records.items())
        return self._names[ontology]


class Difference(NamedTuple):
    """What two look-ups say of one field (of `Term`, or `obsolete`) of one shared term."""

    id: str
    field: str
    a: object
    b: object


def compare(a: Ontology, b: Ontology) -> list[Difference]:
    """Differences between two look-ups over the ids that both know, sorted by id.

    A term in use on both sides is compared field by field; one that only one side made obsolete is
    one difference, `obsolete`. Ids that only one side knows are no difference.
    """
    found = []
    for ontology in ONTOLOGIES:
        for term_id in sorted(a.live(ontology) | b.live(ontology)):
            gone = [side.is_obsolete(term_id) for side in (a, b)]
            if any(gone):
                found.append(Difference(term_id, "obsolete", *gone))
                continue
            left, right = a.get(term_id), b.get(term_id)
            if left is None or right is None:
                continue
            for field in ("label", "definition", "synonyms", "ancestors"):
                values = getattr(left, field), getattr(right, field)
                if values[0] != values[1]:
                    found.append(Difference(term_id, field, *values))
    return found


@cache
def _load(sources: tuple[str, ...], organism: str) -> Ontology:
    given = [read_obo(source) for source in sources]
    others = {stages for species, stages in STAGES_OF.items() if species != organism}
    left_out = others | {release.ontology for release in given}
    rest = [Packaged(name) for name in ONTOLOGIES if name not in left_out]
    return Ontology(sorted([*given, *rest], key=lambda release: list(ONTOLOGIES).index(release.ontology)))


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    ids: dict[str, set[str]] = {}
    for name, term_id in pairs:
        ids.setdefault(name, set()).add(term_id)
    return {name: next(iter(found)) for name, found in ids.items() if len(found) == 1}


def _prefix(term_id: str) -> str:
    return term_id.partition(":")[0]


def _text(text: str) -> str:
    return " ".join(text.split())
