"""A generated Census of realistic shape, for measurements: nothing to download, any number of cells.

The cost of reading, normalising and ranking depends on how many non-zeros a cell has, how they spread over
genes and how large they are; that of texts on how often one repeats. These laws are held (`Law`); what a
cell *is* is not: types do not differ in their genes, so there is nothing here to learn.

- Counts are drawn as a sequencer draws them: a cell's total is lognormal, and each of its molecules falls
  on a gene with a probability that follows a Zipf-Mandelbrot law over 34,000 of 60,000 genes. That gives
  1,670 non-zeros a cell (spread 0.7 in ln), 69% of them 1 and 87% at most 3, 1.7% from 19 on (real cells:
  68%, 85-87% and 1.5-2.3%, in the PBMCs of Zheng 2017 and Kang 2018), and 1.6 bytes each on disk.
- Texts: over 7.1M cells of the Census (its donors' metadata) 11,260 (tissue, type, assay, disease, sex,
  stage) texts stand, and a shuffled batch of 32 cells has 31.3 distinct ones, one of 1,024 has 706. Shares
  that are lognormal with a spread of 1.83 give 31.2 and 707: the sum over texts of 1 - (1 - p)^n.
- A text belongs to a dataset, and the cells of a dataset stand together, as do those of eight datasets
  that are primary data or not (60% of the cells are). Terms are drawn from the ontologies that CELLxGENE
  validates against; their combinations mean nothing. Gene ids have Ensembl's form and are no genes.

A block of 4,096 cells is a function of (seed, block) alone. Drawing takes 0.15 ms a cell, writing the rest:
about 1.5 ms a cell on one core, most of it zstd at level 9.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numba as nb
import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from cellxgene_ontology_guide.ontology_parser import OntologyParser
from scipy.special import ndtri

from langcell.census.layout import build_whole, categorical, make_var, write_census


@dataclass(frozen=True)
class Law:
    """What the cells follow. `version` goes up with any other change of what is drawn.

    block: cells that are drawn and written at a time, two bands of X (1.1 GB at the peak).
    """

    version: int = 1
    block: int = 4096
    genes: int = 60_000
    expressed: int = 34_000
    gene_exponent: float = 1.35
    gene_shift: float = 60.0
    total_median: float = 2_650.0
    total_spread: float = 0.95
    texts: int = 11_260
    text_spread: float = 1.83
    datasets: int = 200
    dataset_spread: float = 1.5
    primary: float = 0.6
    run: int = 8
    cell_types: int = 600


LAW = Law()

# Brain, blood, lung, liver, kidney, heart, skin, eye, breast, small intestine,
# colon, spleen, lymph node, bone marrow, pancreas, stomach, thymus, fat, placenta, ovary.
_ORGANS = [
    "UBERON:0000955",
    "UBERON:0000178",
    "UBERON:0002048",
    "UBERON:0002107",
    "UBERON:0002113",
    "UBERON:0000948",
    "UBERON:0002097",
    "UBERON:0000970",
    "UBERON:0000310",
    "UBERON:0002108",
    "UBERON:0001155",
    "UBERON:0002106",
    "UBERON:0000029",
    "UBERON:0002371",
    "UBERON:0001264",
    "UBERON:0000945",
    "UBERON:0002370",
    "UBERON:0001013",
    "UBERON:0001987",
    "UBERON:0000992",
]
_TYPES_OF_A_DATASET = 24
_TEXTS_OF_A_PROFILE = 6
_UNKNOWN = "unknown"

Facets = dict[str, np.ndarray]
"""Ontology id of each text, by facet; several joined by ` || `."""


def build_synthetic(directory: str, cells: int, seed: int) -> str:
    """The generated Census of so many cells in a folder of its own under `directory`; its path.

    Written unless it stands there: about 1.5 ms a cell. Raises InputError if its place is taken.
    """
    ontologies = OntologyParser().cxg_schema.version
    law = blake2b(repr((asdict(LAW), ontologies)).encode(), digest_size=4).hexdigest()

    def write(whole: str) -> None:
        genes = [f"ENSG9{gene:010d}" for gene in range(LAW.genes)]
        names = [f"SYN{gene}" for gene in range(LAW.genes)]
        write_census(
            whole, draw_counts(cells, seed), draw_obs(cells, seed), make_var(genes, names), "synthetic"
        )

    return build_whole(str(Path(directory) / f"synthetic-{cells}-seed-{seed}-{law}"), write)


def draw_counts(cells: int, seed: int) -> Iterator[sp.csr_matrix]:
    """Counts of the cells, float32 CSR [LAW.block or fewer, genes], block by block."""
    accept, alias = _alias_table((np.arange(1, LAW.expressed + 1) + LAW.gene_shift) ** -LAW.gene_exponent)
    place = np.random.default_rng([seed, 0]).permutation(LAW.genes)[: LAW.expressed].astype(np.int32)
    for block, first in enumerate(range(0, cells, LAW.block)):
        rng = np.random.default_rng([seed, 1, block])
        spread = rng.normal(0, LAW.total_spread, min(LAW.block, cells - first))
        totals = np.maximum(1, np.rint(LAW.total_median * np.exp(spread))).astype(np.int64)
        data, indices, indptr = _draw(rng, totals, accept, alias, place, LAW.genes)
        yield sp.csr_matrix((data, indices, indptr), (len(totals), LAW.genes))


def draw_obs(cells: int, seed: int) -> pa.Table:
    """obs of the cells, in the columns of a release up to those that X tells (`raw_sum`, `nnz`, ...)."""
    rng = np.random.default_rng([seed, 2])
    facets, dataset_of, profile_of = _draw_texts(rng)
    share = np.exp(LAW.text_spread * ndtri((np.arange(LAW.texts) + 0.5) / LAW.texts))
    share = rng.permutation(share / share.sum())
    primary = _primary_datasets(rng, np.bincount(dataset_of, share, LAW.datasets))
    nuclei = rng.random(LAW.datasets) < 0.2
    names = np.array([str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(LAW.datasets)], object)

    text = rng.choice(LAW.texts, cells, p=share)
    text = text[np.argsort(dataset_of[text], kind="stable")]
    dataset = dataset_of[text]
    donor = 3 * profile_of[text] + rng.integers(0, 3, cells)
    parser = OntologyParser()

    def facet(name: str) -> dict[str, pa.Array]:
        ids, codes = np.unique(facets[name], return_inverse=True)
        labels = [
            " || ".join(x if x == _UNKNOWN else parser.get_term_label(x) for x in i.split(" || "))
            for i in ids
        ]
        cell = codes[text]
        return {
            name: categorical(np.array(labels, object)[cell]),
            f"{name}_ontology_term_id": categorical(ids[cell]),
        }

    return pa.table(
        {
            "soma_joinid": np.arange(cells, dtype=np.int64),
            "dataset_id": categorical(names[dataset]),
            **facet("assay"),
            **facet("cell_type"),
            **facet("development_stage"),
            **facet("disease"),
            "donor_id": categorical(np.array([f"donor {d}" for d in range(donor.max() + 1)], object)[donor]),
            "is_primary_data": primary[dataset],
            "observation_joinid": pa.array([f"{i:010x}" for i in range(cells)], pa.large_string()),
            **facet("self_reported_ethnicity"),
            **facet("sex"),
            "suspension_type": categorical(np.where(nuclei[dataset], "nucleus", "cell")),
            **facet("tissue"),
            "tissue_type": categorical(["tissue"] * cells),
            **facet("tissue_general"),
        }
    )


def _draw_texts(rng: np.random.Generator) -> tuple[Facets, np.ndarray, np.ndarray]:
    """The texts, all different: their facets, and the dataset and the donor's profile of each (int64).

    No two datasets share tissue and assay, no two profiles of a dataset stage, sex, disease and ethnicity.
    """
    ontology = OntologyParser()

    def below(root: str, most: int) -> np.ndarray:
        terms = sorted(t for t in ontology.get_term_descendants(root) if not ontology.is_term_deprecated(t))
        return rng.choice(np.array(terms, object), min(most, len(terms)), replace=False)

    types, assays = below("CL:0000000", LAW.cell_types), below("EFO:0010183", 40)
    diseases, stages = below("MONDO:0000001", 200), below("HsapDv:0000001", 120)
    sexes = np.array(["PATO:0000383", "PATO:0000384", _UNKNOWN], object)
    ethnicities = np.append(below("HANCESTRO:0004", 8), _UNKNOWN)
    parts = [(organ, tissue) for organ in _ORGANS for tissue in [organ, *below(organ, 5)]]
    places = rng.choice(len(parts) * len(assays), LAW.datasets, replace=False)
    weight = np.exp(rng.normal(0, LAW.dataset_spread, LAW.datasets))
    sizes = 1 + rng.multinomial(LAW.texts - LAW.datasets, weight / weight.sum())

    rows: list[tuple[np.ndarray, ...]] = []
    profiles = 0
    for dataset, (place, size) in enumerate(zip(places, sizes, strict=True)):
        organ, tissue = parts[place // len(assays)]
        first, second = rng.choice(diseases, 2, replace=False)
        ill = np.array(["PATO:0000461", first, f"{first} || {second}"], object)
        grid = (len(stages), len(sexes), len(ill), len(ethnicities))
        n_profiles = -(-size // _TEXTS_OF_A_PROFILE)
        profile = np.array(np.unravel_index(rng.choice(np.prod(grid), n_profiles, replace=False), grid))
        own_types = rng.choice(types, _TYPES_OF_A_DATASET, replace=False)
        pair = rng.choice(n_profiles * len(own_types), size, replace=False)
        who, what = pair // len(own_types), pair % len(own_types)
        stage, sex, disease, ethnicity = profile[:, who]
        same = [np.full(size, value, object) for value in (tissue, organ, assays[place % len(assays)])]
        own = (own_types[what], stages[stage], sexes[sex], ill[disease], ethnicities[ethnicity])
        rows.append((*own, *same, np.full(size, dataset), profiles + who))
        profiles += n_profiles
    *columns, dataset_of, profile_of = (np.concatenate(column) for column in zip(*rows, strict=True))
    names = ["cell_type", "development_stage", "sex", "disease", "self_reported_ethnicity"]
    names += ["tissue", "tissue_general", "assay"]
    return dict(zip(names, columns, strict=True)), dataset_of, profile_of


def _primary_datasets(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """Which datasets are primary data (bool): whole runs of neighbours, their cells as near to the law's
    share as some of them, taken in random order, come."""
    run = np.arange(len(share)) // LAW.run
    order = rng.permutation(run.max() + 1)
    reached = np.cumsum(np.bincount(run, share)[order])
    taken = order[: 1 + np.argmin(np.abs(reached - LAW.primary))]
    return np.isin(run, taken)


def _alias_table(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias table: one comparison draws an item in proportion to its weight."""
    share = weight / weight.sum() * len(weight)
    accept, alias = np.ones(len(weight)), np.arange(len(weight), dtype=np.int32)
    small, large = list(np.flatnonzero(share < 1)), list(np.flatnonzero(share >= 1))
    while small and large:
        low, high = small.pop(), large[-1]
        accept[low], alias[low] = share[low], high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    return accept, alias


@nb.njit(cache=True, nogil=True)
def _draw(rng, totals, accept, alias, place, n_genes):  # type: ignore[no-untyped-def]
    """Molecules of each cell, counted by gene: data, indices (ascending in a row) and indptr of a CSR."""
    n = len(accept)
    tally, met = np.zeros(n_genes, np.int32), np.empty(n, np.int32)
    room = 1 << 20
    data, indices = np.empty(room, np.float32), np.empty(room, np.int32)
    indptr = np.zeros(len(totals) + 1, np.int64)
    end = 0
    for cell in range(len(totals)):
        genes = 0
        for _ in range(totals[cell]):
            u = rng.random() * n
            k = int(u)
            gene = place[k if u - k < accept[k] else alias[k]]
            if not tally[gene]:
                met[genes] = gene
                genes += 1
            tally[gene] += 1
        if end + genes > room:
            room = 2 * room + genes
            wider_data, wider_indices = np.empty(room, np.float32), np.empty(room, np.int32)
            wider_data[:end], wider_indices[:end] = data[:end], indices[:end]
            data, indices = wider_data, wider_indices
        for gene in np.sort(met[:genes]):
            data[end], indices[end] = tally[gene], gene
            tally[gene] = 0
            end += 1
        indptr[cell + 1] = end
    return data[:end].copy(), indices[:end].copy(), indptr
