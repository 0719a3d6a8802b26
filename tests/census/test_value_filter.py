"""A filter means in memory what it means to SOMA, and can do nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma

from langcell.census.value_filter import columns_of, matching


@pytest.mark.parametrize(
    "expression",
    [
        "is_primary_data == True",
        "is_primary_data == False",
        'cell_type == "natural killer cell"',
        'cell_type != "natural killer cell"',
        'is_primary_data == True and cell_type in ["natural killer cell", "B cell"]',
        'cell_type not in ["natural killer cell", "B cell"] or raw_sum > 2500.5',
        'cell_type in ["no such cell"]',
        'cell_type == "no such cell"',
        "raw_sum >= 1000 and raw_sum < 2000",
        "(nnz <= 200) & (raw_sum > 1500) | (nnz > 400)",
        'not cell_type == "B cell"',
    ],
)
def test_words_of_soma(demo_uri: str, expression: str) -> None:
    with soma.open(f"{demo_uri}/census_data/homo_sapiens/obs") as obs:
        cells = obs.read().concat().to_pandas()
        found = obs.read(value_filter=expression, column_names=["soma_joinid"]).concat()
    expected = np.isin(cells["soma_joinid"], found["soma_joinid"])
    np.testing.assert_array_equal(matching(cells, expression), expected)


def cells() -> pd.DataFrame:
    return pd.DataFrame({"a": ["x", None, "z"], "n": [1, 2, 3], "yes": [True, False, True]})


def test_missing_values_equal_nothing() -> None:
    assert matching(cells(), 'a == "x" or a == "z"').tolist() == [True, False, True]
    assert matching(cells().assign(b=np.nan), 'b == "x" or b in ["y"]').tolist() == [False] * 3


def test_columns_lines_and_no_filter() -> None:
    assert columns_of('a == "b" and n in [1, 2] or a == "c"') == ["a", "n"]
    assert columns_of(" \n") == []
    assert matching(cells(), "").all()
    assert matching(cells(), 'a == "x"\n  and n == 1\n').tolist() == [True, False, False]
    assert matching(cells(), "-1 < n < 3 and yes").tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("a ==", "near column"),
        ("@n == 1", "near column"),
        ('__import__("os").system("true")', "Call is not part of a filter"),
        ('a.str.len() == "x"', "Call is not part|Attribute is not part"),
        ("a[0] == 1", "Subscript is not part"),
        ("n + 1 == 2", "Add is not part"),
        ("(n := 3) == 3", "NamedExpr is not part"),
        ("n == None", "None is no text"),
        ("n == 1j", "1j is no text"),
        ("n", "no condition"),
        ("True", "no condition"),
        ("a < 3", "not supported"),
    ],
)
def test_what_is_no_filter_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        matching(cells(), expression)
