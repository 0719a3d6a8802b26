from dataclasses import replace

import numpy as np
import pytest

from langcell.inference import figures
from langcell.inference.figures import JointSpace
from langcell.inference.tables import Table


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    ids = tuple(f"CL:{i}" for i in range(60))
    truth = np.repeat(np.arange(60), np.arange(1, 61))
    answers = np.where(rng.random(len(truth)) < 0.7, truth, 0)
    return Table(
        name="seen",
        candidates=ids,
        labels={i: f"type {i}" for i in ids},
        rows=np.arange(len(truth)),
        types=tuple(ids[i] for i in truth),
        truth=truth,
        predicted={"ct": answers, "two_step": truth},
        unscored={},
    )


def space(cells, texts=6):
    """Six types, each around its own axis, and a text on each axis; a seventh text fits none."""
    rng = np.random.default_rng(0)
    kind = np.arange(cells) % 6
    z = np.eye(8)[kind] + 0.05 * rng.normal(size=(cells, 8))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return JointSpace(z, [f"type {k}" for k in kind], np.eye(8)[:texts], [f"type {k}" for k in range(texts)])


def test_bars_and_marks_stand_at_the_measures(table):
    table = replace(table, baseline={"accuracy": 0.9, "balanced_accuracy": 0.8, "macro_f1": 0.7})
    axes = figures.tables_bar({"seen": table}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [
        pytest.approx(table.measures(method)["balanced_accuracy"]) for method in ("ct", "two_step")
    ]
    marks = sorted(line.get_ydata()[0] for line in axes.lines)
    assert marks == pytest.approx([1 / 60, table.constant["balanced_accuracy"], 0.8])
    with pytest.raises(ValueError, match="f1"):
        figures.tables_bar({"seen": table}, "f1")


def test_a_confusion_of_many_types_shows_the_largest(table):
    axes = figures.confusion(table, "ct").axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert len(rows) == len(axes.get_xticklabels()) == figures.MOST_TYPES
    assert set(rows) == {f"type CL:{i}" for i in range(20, 60)}  # type i has i + 1 cells
    assert "largest 40" in axes.get_title(loc="left")
    first = axes.get_xticklabels()[0].get_text()
    assert first == "type CL:0"  # the answer that was given most often
    shown = {(t.get_position()[1], t.get_position()[0]): int(t.get_text()) for t in axes.texts}
    types, counts = table.confusion("ct")
    assert shown[rows.index("type CL:59"), 0] == counts[types.index("CL:59"), 0]


def test_an_empty_table_is_said_not_drawn(table):
    empty = replace(table, rows=np.array([]), types=(), truth=np.array([]), predicted={}, empty="no cell")
    assert figures.confusion(empty, "ct") is None
    axes = figures.tables_bar({"seen": empty}).axes[0]
    assert not axes.patches
    assert "no cell" in axes.texts[0].get_text()


def test_losses_have_a_panel_each_and_a_rule_at_stage_two():
    rows = [{"step": i, "stage": 1, "mgm": 9.0 - i / 10, "cells_per_s": 50.0} for i in range(30)]
    rows += [{"step": i, "stage": 2, "mgm": 5.0, "ct": 3.0, "mfu": None} for i in range(30, 60)]
    rows[29]["val_mgm"] = 7.0
    mgm, ct = figures.losses(rows).axes
    assert mgm.get_title(loc="left").startswith("MGM")
    assert ct.get_title(loc="left").startswith("C-T")
    raw, _, judged, rule = mgm.lines
    assert raw.get_ydata()[:2].tolist() == [9.0, 8.9]
    assert judged.get_xydata().tolist() == [[29, 7.0]]
    assert rule.get_xdata() == [30, 30]
    assert len(ct.lines) == 2  # begins with stage 2: no rule
    (rate,) = figures.throughput(rows).axes
    assert rate.get_ylim()[0] == 0
    assert figures.losses([]) is None
    assert figures.throughput([{"step": 0, "stage": 1, "mgm": 1.0}]) is None


@pytest.mark.slow
def test_a_text_stands_among_the_cells_it_is_nearest_to():
    joint = space(90)
    axes = figures.joint_space(joint).axes[0]
    points = [c for c in axes.collections if len(c.get_offsets()) > 1]
    stars = [c.get_offsets()[0] for c in axes.collections if len(c.get_offsets()) == 1]
    assert len(points) == len(stars) == 6
    centres = np.array([c.get_offsets().mean(0) for c in points])
    for star, centre in zip(stars, centres, strict=True):
        assert (
            np.linalg.norm(centres - star, axis=1).argmin() == np.flatnonzero((centres == centre).all(1))[0]
        )


def test_too_few_cells_make_no_map():
    assert figures.joint_space(space(figures.FEWEST_CELLS - 1)) is None
