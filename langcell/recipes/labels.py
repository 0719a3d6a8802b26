"""What is to be learnt: a target from columns of obs, and which cells train, validate and test.

Splits are said in words, since they decide what a figure means: cells of one donor on both sides of a random
split look like new cells and are not. Groups (donor, dataset) stay together where a column names them.

Shape suffixes: N cells, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from langcell.errors import InputError
from langcell.inference.predict import JOINED, Head
from langcell.model.classifier import Kind

PARTS = ("train", "val", "test")
SAID = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
"""Other words for the parts, which a column may have in any capitals."""
SEVERAL = "labels"
"""What the target is called where several columns make it."""
TRUE_FALSE = {True: 1, False: 0, "True": 1, "False": 0, "true": 1, "false": 0, "0": 0, "1": 1}  # True is 1


@dataclass(frozen=True)
class Labels:
    """head: what the values are; value: int64 [N] classes, float64 [N] in the target's unit, or float64 [N,
    L] of 0 and 1."""

    head: Head
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.value)

    def learnt(self, split: Split) -> tuple[Labels, Split]:
        """Of a classification: the classes of the training cells alone, and the split without cells of
        others. Raises InputError where the training cells are of one class, or no test cell is of theirs."""
        trained = np.unique(self.value[split.train])
        if len(trained) < 2:
            raise InputError(
                f"{split.option}: every training cell is {self.head.classes[trained[0]]!r}, by the rule: "
                f"{split.rule}; two classes at least"
            )
        known = np.isin(self.value, trained)
        kept = replace(split, val=split.val[known[split.val]], test=split.test[known[split.test]])
        if not len(kept.test):
            raise InputError(f"{split.option}: no test cell is of a class that is trained: {split.rule}")
        head = replace(self.head, classes=tuple(self.head.classes[i] for i in trained))
        lost = len(split.val) + len(split.test) - len(kept.val) - len(kept.test)
        kept = replace(kept, left_out={**split.left_out, "class of no training cell": lost})
        return Labels(head, np.searchsorted(trained, self.value)), kept

    def standardised_by(self, rows: np.ndarray) -> Labels:
        """The same; a regression with mean and deviation of the cells `rows`. Raises InputError where these
        have one value alone."""
        if self.head.kind != "regression":
            return self
        mean, std = float(self.value[rows].mean()), float(self.value[rows].std())
        if std == 0:
            raise InputError(
                f"finetune.target: obs[{self.head.target!r}] is {mean:g} for every training cell; there is "
                "nothing to learn"
            )
        return replace(self, head=replace(self.head, mean=mean, std=std))

    def targets(self, rows: np.ndarray) -> Tensor:
        """Of some cells, as the loss takes them: classes int64, numbers standardised float32, labels
        float32."""
        value = self.value[rows]
        if self.head.kind == "classification":
            return torch.from_numpy(value)
        if self.head.kind == "regression":
            value = (value - self.head.mean) / self.head.std
        return torch.from_numpy(value.astype(np.float32))


def read_labels(obs: pd.DataFrame, columns: Sequence[str], kind: Kind) -> Labels:
    """The target of every cell.

    columns: one; for `multilabel` also several of true and false (or 0 and 1), where one holds the labels
    of a cell joined by `||` ('' for none). Raises InputError: no such column, a cell without a value, what
    is no number, fewer than two classes, a class of one cell, a label that all cells have or none has.
    """
    for name in columns:
        if name not in obs:
            raise InputError(
                f"finetune.target: obs has no column {name!r}; it has: {', '.join(map(str, obs))}"
            )
        missing_N = obs[name].isna().to_numpy()
        if kind == "classification":
            missing_N = missing_N | (obs[name].astype(str).str.strip() == "").to_numpy()
        missing = np.flatnonzero(missing_N)
        if len(missing):
            raise InputError(
                f"finetune.target: {len(missing)} of {len(obs)} cells have no value in obs[{name!r}] (first: "
                f"{obs.index[missing[0]]}); take them out of the file"
            )
    if kind == "multilabel":
        return _several(obs, columns)
    if len(columns) != 1:
        raise InputError(f"finetune.target: {len(columns)} columns; a {kind} takes one")
    column = obs[columns[0]]
    return _classes(column) if kind == "classification" else _numbers(column)


def _classes(column: pd.Series) -> Labels:
    name = str(column.name)
    classes, value, count = np.unique(
        column.astype(str).to_numpy(str), return_inverse=True, return_counts=True
    )
    if len(classes) < 2:
        raise InputError(
            f"finetune.target: every cell of obs[{name!r}] is {str(classes[0])!r}; two classes at least"
        )
    if count.min() < 2:
        raise InputError(
            f"finetune.target: obs[{name!r}] has classes of one cell, which cannot be learnt and tested: "
            f"{', '.join(classes[count < 2][:10])}. Take these cells out, or join the class to another"
        )
    return Labels(Head(name, "classification", tuple(classes.tolist())), value.astype(np.int64))


def _numbers(column: pd.Series) -> Labels:
    name = str(column.name)
    if column.dtype == bool:
        raise InputError(f"finetune.target: obs[{name!r}] holds true and false; a regression needs numbers")
    try:
        value = column.astype(np.float64).to_numpy()
    except (TypeError, ValueError) as error:
        raise InputError(f"finetune.target: obs[{name!r}] holds no numbers: {error}") from error
    if not np.isfinite(value).all():
        raise InputError(f"finetune.target: obs[{name!r}] holds infinite values")
    return Labels(Head(name, "regression"), value)


def _several(obs: pd.DataFrame, columns: Sequence[str]) -> Labels:
    if len(columns) == 1:
        name = columns[0]
        held = [
            {label.strip() for label in str(text).split(JOINED) if label.strip()} for text in obs[columns[0]]
        ]
        labels = sorted(set().union(*held))
        value_NL = np.array([[label in of for label in labels] for of in held], np.float64)
    else:
        name, labels = SEVERAL, list(columns)
        for column in columns:
            unknown = set(obs[column].unique()) - TRUE_FALSE.keys()
            if unknown:
                raise InputError(
                    f"finetune.target: obs[{column!r}] must hold true and false, or 0 and 1, for several "
                    f"labels; it holds {sorted(map(str, unknown))[0]}"
                )
        value_NL = np.stack([[TRUE_FALSE[v] for v in obs[column]] for column in columns], 1).astype(
            np.float64
        )
    if len(labels) < 2:
        raise InputError(
            f"finetune.target: {len(labels)} label in obs[{name!r}]; several are joined by {JOINED} or stand "
            "in several columns"
        )
    same = [label for label, share in zip(labels, value_NL.mean(0), strict=True) if share in (0, 1)]
    if same:
        raise InputError(f"finetune.target: labels of all cells, or of none: {', '.join(same[:10])}")
    return Labels(Head(name, "multilabel", tuple(labels)), value_NL)


@dataclass(frozen=True)
class Split:
    """Rows of the cells that train, validate (there may be none) and test (int64, ascending); rule: in
    words; option: by which it was asked for; left_out: how many cells are in none of the parts, and why."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    rule: str
    option: str
    left_out: dict[str, int] = field(default_factory=dict)


def split_cells(
    labels: Labels,
    obs: pd.DataFrame,
    by: str | None,
    *,
    test_share: float,
    val_share: float,
    seed: int,
    option: str,
) -> Split:
    """Which cells train, validate and test.

    by: None, so much of the cells (of each class) at random; a column whose values are the parts themselves,
    train, test and maybe val (in any capitals, or `SAID`; cells of other values take no part); or one whose
    groups stay together (a cell without one takes no part).
    option: what errors call `by`. Raises InputError where training or test would have no cell, and for a
    column that names some of the parts.
    """
    if by is None:
        part_N, rule = _at_random(labels, test_share, val_share, seed)
    elif by not in obs:
        raise InputError(f"{option}: obs has no column {by!r}; {_has(obs)}")
    else:
        group_N = obs[by].astype(str).to_numpy(str)
        words = {group: group.strip().casefold() for group in np.unique(group_N).tolist()}
        part_of = {group: SAID.get(word, word) for group, word in words.items()}
        parts = set(part_of.values()) & set(PARTS)
        if {"train", "test"} <= parts:
            part_N = np.array([part_of[group] for group in group_N.tolist()])
            rule = f"as obs[{by!r}] says"
        elif parts:
            raise InputError(
                f"{option}: obs[{by!r}] holds {', '.join(map(repr, list(words)[:10]))}; parts are called "
                "train, test and maybe val, groups by none of these words"
            )
        else:
            has = obs[by].notna().to_numpy()
            part_N = np.full(len(obs), "", object)
            part_N[has], rule = _by_group(group_N[has], by, test_share, val_share, seed, option)
    train, val, test = (np.flatnonzero(part_N == part) for part in PARTS)
    for part, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise InputError(f"{option}: no cell to {part} by the rule: {rule}")
    others = len(part_N) - len(train) - len(val) - len(test)
    return Split(train, val, test, rule, option, {f"obs[{by!r}] names no part": others} if others else {})


def _at_random(labels: Labels, test_share: float, val_share: float, seed: int) -> tuple[np.ndarray, str]:
    stratified = labels.head.kind == "classification"
    class_N = labels.value if stratified else np.zeros(len(labels), np.int64)
    random = np.random.default_rng(seed)
    part_N = np.full(len(labels), "train", object)
    for one in np.unique(class_N):
        rows = random.permutation(np.flatnonzero(class_N == one))
        n_test = max(1, round(test_share * len(rows)))
        n_val = min(round(val_share * len(rows)), len(rows) - n_test - 1)
        part_N[rows[:n_test]] = "test"
        part_N[rows[n_test : n_test + max(0, n_val)]] = "val"
    of = "the cells of each class" if stratified else "the cells"
    return (
        part_N,
        f"{test_share:.0%} of {of} to test and {val_share:.0%} to validate, at random (seed {seed})",
    )


def _by_group(
    group_N: np.ndarray, by: str, test_share: float, val_share: float, seed: int, option: str
) -> tuple[np.ndarray, str]:
    """Groups in seeded order, to test until its share is reached, then to validation, the rest to
    training."""
    groups, of_N, count = np.unique(group_N, return_inverse=True, return_counts=True)
    needed = 3 if val_share > 0 else 2
    if len(groups) < needed:
        raise InputError(
            f"{option}: obs[{by!r}] has {len(groups)} group{'s' * (len(groups) != 1)}; {needed} at "
            "least are needed to keep groups together" + " (2 with --finetune.val_share 0)" * (needed == 3)
        )
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    part_G = np.full(len(groups), "train", object)
    for part, share in (("test", test_share), ("val", val_share)):
        cells, left = 0, {"test": needed - 1, "val": 1}[part]
        while share > 0 and len(order) > left and cells < share * len(group_N):
            group = order.pop(0)
            part_G[group] = part
            cells += count[group]
    n = {part: int((part_G == part).sum()) for part in PARTS}
    return part_G[of_N], (
        f"groups of obs[{by!r}] stay together, drawn by seed {seed}: {n['test']} to test, {n['val']} to "
        f"validate, {n['train']} to train"
    )


def _has(obs: pd.DataFrame) -> str:
    return f"it has: {', '.join(map(str, obs))}"
