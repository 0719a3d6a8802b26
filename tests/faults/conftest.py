"""What the fault tests share: the run that nothing disturbs, beside which the others are held."""

from __future__ import annotations

import pytest

from tests.faults.making import Straight, Tiny, train


@pytest.fixture(scope="session")
def straight(ray_session: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Both stages, undisturbed, with two workers."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    return Straight(run_dir, train(tiny, run_dir))
