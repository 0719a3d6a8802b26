"""What tests of recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from langcell.recipes import prepare
from tests.recipes.making import config


@pytest.fixture(scope="session")
def demo_corpus(ray_session: None, demo_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded cells, prepared once per session; only read."""
    folder = tmp_path_factory.mktemp("recipes") / "corpus"
    prepare.run(config(demo_uri, folder))
    return folder
