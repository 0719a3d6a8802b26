import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from langcell import files
from langcell.inference.tables import TABLES, Table
from langcell.recipes.report import MEANING, write_report

ODD = "<script>alert('1')</script> & \"odd\" {{ 7 * 7 }} Ü ||"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest and keeps what a reader sees and what a browser would load."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.loads, self.images, self.text = [], [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def tables(label="a type"):
    made = {}
    for name in TABLES:
        candidates = ("CL:1", "CL:2", "CL:3")
        truth = np.array([0, 0, 1, 1, 1])
        made[name] = Table(
            name=name,
            candidates=candidates,
            labels={term: f"{label} {term}" for term in candidates},
            rows=np.arange(5),
            types=tuple(candidates[i] for i in truth),
            truth=truth,
            predicted={"ct": truth, "two_step": np.array([0, 1, 1, 1, 2])},
            unscored={"no ontology term": 1234},
            baseline={"accuracy": 0.987, "balanced_accuracy": 0.876, "macro_f1": 0.765}
            if name == "seen"
            else None,
        )
    return made


def empty_tables():
    nothing = np.empty(0, np.int64)
    return {
        name: Table(name, (), {}, nothing, (), nothing, {"ct": nothing}, {}, "0 candidates, two are needed")
        for name in TABLES
    }


def write(directory, **changes):
    rows = [{"step": i, "stage": 1, "mgm": 9.0, "cc": 2.0, "cells_per_s": 5.0} for i in range(4)]
    arguments = {
        "title": "A run",
        "metrics": rows,
        "tables": tables(),
        "joint_space": None,
        "config_yaml": "run:\n  dir: runs/pretrain\n",
        "versions": {"torch": "2.13.0"},
        "manifest": {"filter": "is_primary_data == True"},
        "summary": {"steps": 4, "cells_per_s": 12345.6, "losses": {"mgm": 9.0}, "export": "runs/export"},
        **changes,
    }
    return write_report(directory, **arguments)


def test_it_is_one_page_that_holds_every_picture_and_loads_nothing(tmp_path):
    path = write(tmp_path / "new" / "report")
    assert path == tmp_path / "new" / "report" / "index.html"
    page = Page(path.read_text())
    pictures = {file.stem: file.read_bytes() for file in path.parent.glob("*.png")}
    assert set(pictures) == {"losses", "throughput", "tables", *(f"confusion_{name}" for name in TABLES)}
    embedded = [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in page.images]
    assert sorted(embedded) == sorted(pictures.values())
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "http" not in path.read_text().replace("http-equiv", "")
    assert {file.name for file in path.parent.iterdir()} == {"index.html"} | {f"{p}.png" for p in pictures}


def test_it_says_what_each_table_measures_and_its_figures(tmp_path):
    text = " ".join(Page(write(tmp_path).read_text()).text.split())
    for name in TABLES:
        assert MEANING[name] in text
    assert "near zero after training on few types" in text
    # two_step is right for 1 of 2 and 2 of 3 cells; the baseline stands in one table.
    assert text.count("two_step 0.583 0.600") == 5
    assert text.count("logistic regression 0.876 0.987 0.765") == 1
    assert text.count("best constant answer 0.500 0.600 0.375") == 5
    assert "5 cells of 2 types, 3 candidates, chance 0.333." in text
    assert "Not scored: 1,234 (no ontology term)." in text
    assert "cells per s 12,346" in text
    assert "torch 2.13.0" in text


def test_odd_characters_are_shown_not_run(tmp_path):
    page = Page(
        write(
            tmp_path,
            title=ODD,
            tables=tables(ODD),
            config_yaml=f"run: {ODD}",
            versions={ODD: ODD},
            manifest={"filter": ODD},
            summary={"export": ODD},
        ).read_text()
    )
    assert "script" not in page.tags
    assert page.text.count(ODD) >= 1 + 3 * len(TABLES) + 4
    assert json.dumps(ODD, ensure_ascii=False) in page.text  # the manifest, as JSON


def test_a_run_with_nothing_to_show_has_a_report(tmp_path):
    page = Page(write(tmp_path, metrics=[], tables=empty_tables(), summary={}, versions={}).read_text())
    assert page.text.count("0 candidates, two are needed") == 5
    assert len(page.images) == 1  # the bars, which say that the tables are empty
    assert "No step was logged." in page.text
    assert "No table was made." in Page(write(tmp_path, tables={}).read_text()).text


def test_a_failed_write_leaves_the_report_that_was_there(tmp_path, monkeypatch):
    before = write(tmp_path).read_bytes()

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, title="Another")
    assert (tmp_path / "index.html").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
