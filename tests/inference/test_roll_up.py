"""The deepest term that is sure enough."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from langcell.inference.roll_up import roll_up

PARENTS = {
    "CL:1": [],
    "CL:2": ["CL:1"],
    "CL:3": ["CL:2"],
    "CL:4": ["CL:2"],
    "CL:5": ["CL:1"],
}
"""1 over 2 and 5; 2 over 3 and 4."""


@pytest.mark.parametrize(
    ("share", "enough", "answer"),
    [
        ([0.9, 0.1, 0.0], 0.8, "CL:3"),
        ([0.5, 0.4, 0.1], 0.8, "CL:2"),
        ([0.3, 0.3, 0.4], 0.8, "CL:1"),
        ([0.3, 0.3, 0.4], 1.0, "CL:1"),
        ([0.5, 0.5, 0.0], 0.5, "CL:3"),
        ([0.3, 0.4, 0.3], 0.3, "CL:4"),
    ],
)
def test_shares_are_gathered_upwards(
    toy: SimpleNamespace, share: list[float], enough: float, answer: str
) -> None:
    found = roll_up(np.array([share], np.float32), ["CL:3", "CL:4", "CL:5"], toy.Ontology(PARENTS), enough)
    assert found.tolist() == [answer]


def test_free_text_keeps_its_share_to_itself(toy: SimpleNamespace) -> None:
    ontology, terms = toy.Ontology(PARENTS), ["CL:3", "", "CL:5"]
    share = np.array([[0.4, 0.5, 0.1], [0.7, 0.2, 0.1]])
    assert roll_up(share, terms, ontology, 0.6).tolist() == ["", "CL:3"]
    assert roll_up(share, ["", "", ""], ontology, 0.6).tolist() == ["", ""]


def test_a_coarse_candidate_counts_for_itself_and_what_is_above(toy: SimpleNamespace) -> None:
    share = np.array([[0.5, 0.3, 0.2]])
    assert roll_up(share, ["CL:2", "CL:3", "CL:5"], toy.Ontology(PARENTS), 0.7).tolist() == ["CL:2"]
