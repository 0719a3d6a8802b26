"""How metadata becomes sentences: the options of the text room (standard library only)."""

from dataclasses import dataclass, field

FACETS = (
    "cell_type",
    "assay",
    "development_stage",
    "tissue",
    "tissue_general",
    "disease",
    "sex",
    "self_reported_ethnicity",
)
"""The eight facets in the order of the texts: obs columns, each with a `*_ontology_term_id` beside it."""


@dataclass
class TextOptions:
    """The text of a cell."""

    facets: list[str] = field(default_factory=lambda: list(FACETS))
    """Facets that stand in a text, in this order (obs column names)."""
    define: list[str] = field(default_factory=lambda: list(FACETS))
    """Facets whose ontology definition follows the name."""
    ontologies: list[str] = field(default_factory=list)
    """OBO Foundry releases (OWL or OBO; files or URLs) read in place of those that CELLxGENE ships in `cellxgene-ontology-guide`, each for its own ontology."""
    short_variants: int = 3
    """Shortened variants made of each text, with facets other than the cell type dropped at random (count); the last one is the cell type alone."""
    short_share: float = 0.25
    """Share of the texts of an epoch that are read in a shortened variant (0 to 1)."""
    max_length: int = 512
    """Most tokens of a text (tokens); longer ones are cut and counted."""
