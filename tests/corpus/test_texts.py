import numpy as np
import pyarrow as pa
import pytest

from langcell.corpus.schema import SPLITS
from langcell.corpus.texts import NAME, describe_obs, read_texts, text_columns, write_texts
from langcell.errors import InputError
from langcell.storage import open_root, write_file
from langcell.text.describe import describe
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

OPTIONS = TextOptions(facets=["cell_type", "tissue", "sex"], define=["cell_type"], short_variants=2)
B, T, CD4, NK = "CL:0000236", "CL:0000084", "CL:0000624", "CL:0000623"
ROWS = [
    # cell type (label, id), tissue, sex
    (("B cell", B), ("blood", "UBERON:0000178"), ("female", "PATO:0000383")),
    (("T cell", T), ("blood", "UBERON:0000178"), ("male", "PATO:0000384")),
    (("CD4-positive, alpha-beta T cell", CD4), ("spleen", "UBERON:0002106"), ("unknown", "unknown")),
    (("natural killer cell", NK), ("blood", "UBERON:0000178"), (None, None)),
    (("my own cell", "unknown"), ("blood", "UBERON:0000178"), ("male", "PATO:0000384")),
    # `unknown` and a missing value are the same text: two combinations, one row of the table
    (("natural killer cell", NK), ("blood", "UBERON:0000178"), ("unknown", "unknown")),
]


def obs_of(cells: np.ndarray) -> pa.Table:
    """obs of cells that have these rows of ROWS."""
    columns = {}
    for i, facet in enumerate(OPTIONS.facets):
        for j, name in enumerate((facet, f"{facet}_ontology_term_id")):
            columns[name] = pa.array([ROWS[r][i][j] for r in cells], pa.string()).dictionary_encode()
    return pa.table(columns)


@pytest.fixture(scope="module")
def ontology() -> Ontology:
    return Ontology.packaged()


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """Row of ROWS of each of 200 cells."""
    return np.random.default_rng(0).integers(0, len(ROWS), 200)


@pytest.fixture(scope="module")
def obs(cells: np.ndarray) -> pa.Table:
    return obs_of(cells)


def test_every_cell_has_the_text_of_its_own_row(obs, cells, ontology):
    assert text_columns(OPTIONS) == obs.column_names
    texts, text_of_cell, coverage = describe_obs(obs, ontology, OPTIONS)
    assert len(texts) == 5
    assert (np.diff(texts.text_id) > 0).all()
    for row, text in zip(cells, text_of_cell, strict=True):
        facets = dict(zip(OPTIONS.facets, ROWS[row], strict=True))
        expected = describe(facets, ontology, OPTIONS)
        assert texts.text_id[text] == expected.text_id
        assert texts.variants[text] == [expected.text, *expected.variants]
        assert texts.term[text] == expected.term
        assert set(texts.ancestors[text]) == ontology.ancestors(expected.term)
    assert texts.terms == sorted([B, T, CD4, NK])
    assert [texts.terms[i] if i >= 0 else "" for i in texts.term_index] == texts.term
    assert coverage.cells == len(cells)
    assert coverage.to_dict()["facets"]["sex"]["unknown"] == np.isin(cells, [2, 3, 5]).sum()


def test_the_order_of_the_cells_changes_no_text(obs, cells, ontology):
    order = np.random.default_rng(1).permutation(len(cells))
    texts, text_of_cell, _ = describe_obs(obs, ontology, OPTIONS)
    again, text_again, _ = describe_obs(obs.take(order), ontology, OPTIONS)
    assert (again.text_id == texts.text_id).all()
    assert again.variants == texts.variants
    assert (text_again == text_of_cell[order]).all()


def test_the_table_reads_back_with_the_cells_of_each_split(obs, cells, ontology, tmp_path):
    texts, text_of_cell, _ = describe_obs(obs, ontology, OPTIONS)
    split = np.random.default_rng(2).integers(0, len(SPLITS), len(cells)).astype(np.int8)
    counted = texts.count(text_of_cell, split)
    write_file(open_root(str(tmp_path)), NAME, write_texts(counted))
    back = read_texts(str(tmp_path))
    assert (back.text_id == texts.text_id).all()
    assert back.cells.tolist() == [
        [int(((text_of_cell == k) & (split == s)).sum()) for s in range(len(SPLITS))]
        for k in range(len(texts))
    ]
    for name in ("variants", "term", "ancestors", "facet_ids"):
        assert getattr(back, name) == getattr(texts, name)
    assert back.facet_ids["tissue"][back.term.index(CD4)] == "UBERON:0002106"
    with pytest.raises(InputError, match=r"has no texts\.parquet"):
        read_texts(str(tmp_path / "elsewhere"))
