"""Batches that are mixed score above batches that lie apart, and what cannot be measured is said."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from langcell.errors import InputError
from langcell.inference import integration as module
from langcell.inference.integration import integration

MIXING = ("BRAS", "iLISI", "Graph connectivity", "PCR comparison", "Batch correction", "Total")


@pytest.mark.slow  # a minute of compilation
def test_mixed_batches_score_above_separated_ones() -> None:
    random = np.random.default_rng(0)
    type_N, batch_N = random.integers(0, 3, 300), random.integers(0, 2, 300)
    mixed = 4 * random.normal(size=(3, 16))[type_N] + random.normal(size=(300, 16))
    apart = mixed + 6 * batch_N[:, None]
    noise = random.normal(size=(300, 16))
    spaces = {"mixed": mixed, "apart": apart, "noise": noise}
    found = integration(spaces, type_N.astype(str), batch_N.astype(str), unintegrated="apart")
    for measure in MIXING:
        assert found["mixed"][measure] > found["apart"][measure], measure
    # Noise mixes batches as well as anything, and knows no type.
    assert found["noise"]["iLISI"] > 0.8
    assert found["noise"]["Bio conservation"] < found["mixed"]["Bio conservation"]
    batch = [found["mixed"][name] for name in ("BRAS", "iLISI", "Graph connectivity", "PCR comparison")]
    assert found["mixed"]["Batch correction"] == pytest.approx(np.mean(batch), abs=1e-6)
    total = 0.4 * found["mixed"]["Batch correction"] + 0.6 * found["mixed"]["Bio conservation"]
    assert found["mixed"]["Total"] == pytest.approx(total, abs=1e-6)


def test_what_cannot_be_measured_is_said() -> None:
    space = {"x": np.zeros((200, 2))}
    two = ["a", "b"] * 100
    with pytest.raises(InputError, match="of one batch"):
        integration(space, two, ["a"] * 200, unintegrated="x")
    with pytest.raises(InputError, match="of one type"):
        integration(space, ["a"] * 200, two, unintegrated="x")
    with pytest.raises(InputError, match="more than 90 are needed"):
        integration({"x": np.zeros((90, 2))}, two[:90], two[:90], unintegrated="x")


def test_without_the_package_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'langcell\[evaluate\]'"):
        module.check_installed()
