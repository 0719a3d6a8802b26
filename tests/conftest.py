"""What several rooms' tests share, and what of them there is time for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # before ray is imported


BEGAN = time.monotonic()
LAST = ("faults", "cluster", "bench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip tests that would begin after so many minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest go last: where time is short it is they that are left out."""
    items.sort(key=lambda item: LAST.index(item.path.parent.name) if item.path.parent.name in LAST else -1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A slow machine tells what it left out, and is not cut off in the middle."""
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of this run are over")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of four logical CPUs for the whole test session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded mini Census, built once per session."""
    from langcell.census.demo import build_demo

    return build_demo(str(tmp_path_factory.mktemp("census") / "demo"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data for tests, or a skip where it does not stand beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no test data at {path}")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The prepared corpus of tiny training runs (`tests.faults.making.Tiny`), made by a process of its
    own."""
    import subprocess
    import sys

    from tests.faults.making import TEXT, Tiny, argv
    from tests.small_text import small_text

    folder = tmp_path_factory.mktemp("tiny")
    small_text(folder / TEXT)
    job = Path(__file__).parents[1] / "jobs" / "prepare.py"
    demo = job.parent / "configs" / "demo.yaml"
    command = [sys.executable, str(job), f"--config={demo}", "--run.ray_address=local", *argv(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return Tiny(folder)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model in the shape of the demo's export: its genes, medians and cell types, a cell encoder
    of one layer of 32, MiniLM."""
    import numpy as np
    import pyarrow as pa

    from langcell.cells.beta import Beta
    from langcell.cells.normalize import normalize
    from langcell.cells.vocabulary import Vocabulary
    from langcell.census.demo import DEMO_TYPES, _cells
    from langcell.inference.pretrained import TYPES, Pretrained
    from langcell.model.interop import build_model, load_tokenizer
    from langcell.model.options import ModelOptions
    from langcell.text.ontology import Ontology

    counts, obs, var = _cells()
    counts.data = normalize(counts, obs["raw_sum"].to_numpy())
    columns = counts.tocsc()
    genes = var["feature_id"].to_pylist()
    medians = [np.median(columns.data[slice(*columns.indptr[i : i + 2])]) for i in range(len(genes))]
    beta = Beta(genes, genes, np.diff(columns.indptr).astype(np.int64), np.array(medians, np.float32))
    vocabulary = Vocabulary.from_beta(beta)
    options = ModelOptions(cell_layers=1, cell_width=32, cell_heads=4, text_pooling="mean")
    terms = sorted(DEMO_TYPES.values())
    ontology = Ontology.packaged()
    labels = [term.label for term in map(ontology.get, terms) if term is not None]
    blood = ["UBERON:0000178"] * len(terms)
    directory = tmp_path_factory.mktemp("export") / "tiny"
    Pretrained(
        model=build_model(options, vocabulary.size, 128, seed=0).eval(),
        tokenizer=load_tokenizer("minilm"),
        vocabulary=vocabulary,
        beta=beta,
        config={
            "projection": options.projection,
            "pooling": "mean",
            "organism": "homo_sapiens",
            "max_length": 128,
            "tau": 0.2,
            "text": {"facets": ["cell_type", "tissue"], "define": ["cell_type"], "max_length": 64},
            "beta_hash": beta.hash,
            "vocabulary_hash": vocabulary.hash,
        },
        types=pa.Table.from_arrays(
            [pa.array(column) for column in (terms, labels, blood, blood, [70] * len(terms))], schema=TYPES
        ),
        name="tiny",
        card="# tiny",
    ).save_pretrained(directory)
    return directory
