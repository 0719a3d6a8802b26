"""What `cluster/monitoring` ships is valid, and its alerts fire when they should, as Prometheus judges it.

That each query finds data is shown on a running job (`tests/jobs/test_ray_job.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from langcell.corpus import progress
from langcell.train import gauges

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
OURS = {
    "loss",
    *gauges.GAUGES,
    *gauges.EVENTS,
    *(f"prepare_{name}" for name in progress.GAUGES),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on PATH (Debian: apt-get install prometheus)")
    told = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_only_loopback_is_listened_on() -> None:
    """The command that users copy, and the addresses beside it."""
    text = (MONITORING / "prometheus.yml").read_text()
    assert "--web.listen-address=127.0.0.1:9090" in text
    assert "GF_SERVER_HTTP_ADDR=127.0.0.1" in text
    assert set(re.findall(r"(\d+\.\d+\.\d+\.\d+|\[?::\]?):\d+", text)) == {"127.0.0.1"}


@pytest.mark.parametrize("file", ["langcell-dashboard.json", "alerts.yml"])
def test_queries_name_gauges_that_exist(file: str) -> None:
    named = set(re.findall(r"ray_langcell_(\w+)", (MONITORING / file).read_text()))
    assert named
    assert named <= OURS


def test_every_gauge_has_a_panel() -> None:
    text = (MONITORING / "langcell-dashboard.json").read_text()
    assert OURS - set(re.findall(r"ray_langcell_(\w+)", text)) == {"ctm_empty"}, (
        "it says nothing a glance needs"
    )


def test_panels_use_the_variables_and_do_not_overlap() -> None:
    dashboard = json.loads((MONITORING / "langcell-dashboard.json").read_text())
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    taken = set[tuple[int, int]]()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            by_run = set(re.findall(r"ray_langcell_(\w+)", target["expr"])) - {
                f"prepare_{name}" for name in progress.GAUGES
            }
            assert not by_run or 'run=~"$run"' in target["expr"], panel["title"]
