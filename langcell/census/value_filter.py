"""`census.filter` over a table in memory: the words of a SOMA value filter, evaluated by pandas.

pandas can do more than a filter may: call functions and reach variables. The expression is therefore
parsed first, and whatever is no comparison of columns with values is refused.
"""

from __future__ import annotations

import ast

import numpy as np
import pandas as pd

_ALLOWED = (
    ast.Expression,
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.BitAnd, ast.BitOr),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
    *(ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Load),
)


def columns_of(expression: str) -> list[str]:
    """Columns that the filter reads, each once; none where it is empty.

    Raises ValueError where it is no filter, saying why.
    """
    line = _line(expression)
    if not line:
        return []
    try:
        tree = ast.parse(line, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{error.msg} near column {error.offset}") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"{type(node).__name__} is not part of a filter")
        if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float):
            raise ValueError(f"{node.value!r} is no text, number, True or False")
    return list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))


def matching(cells: pd.DataFrame, expression: str) -> np.ndarray:
    """Whether each row of `cells` matches (bool); all do where the expression is empty.

    cells: the columns of `columns_of`. A missing value equals nothing. Raises ValueError where a comparison
    makes no sense, or the expression is no condition.
    """
    line = _line(expression)
    if not line:
        return np.ones(len(cells), bool)
    names = columns_of(line)
    try:
        # Without scopes of its own no name means anything but a column.
        hit = cells[names].eval(line, engine="python", local_dict={}, global_dict={})
    except (TypeError, ValueError, NotImplementedError, SyntaxError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(hit, pd.Series) or hit.dtype != bool:
        raise ValueError("it is no condition on columns")
    return hit.to_numpy()


def _line(expression: str) -> str:
    """One line: pandas takes several for several expressions."""
    return " ".join(expression.splitlines()).strip()
