"""Debian's Prometheus with the configuration that ships, over a test's head; what a dashboard asks of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.jobs.head import ROOT, Head, end, free_ports, wait_until_up

MONITORING = ROOT / "cluster" / "monitoring"
DISCOVERY = "prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, what: str, **parameters: Any) -> Any:
        """`data` of an answer of its HTTP API."""
        answer = requests.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def over(self, query: str, start: float, stop: float) -> list[dict[str, Any]]:
        """The series of a query over a while, a value every two seconds."""
        return self.get("query_range", query=query, start=start, end=stop, step=2)["result"]


@contextmanager
def running_prometheus(head: Head, folder: Path) -> Iterator[Prometheus]:
    """Its configuration, but for where this head's list of nodes lies and how often it is asked."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"][0] == f"/tmp/ray/{DISCOVERY}"
    job["file_sd_configs"][0] = {"files": [str(head.dir / DISCOVERY)], "refresh_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    log = (folder / "prometheus.log").open("w")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--web.listen-address=127.0.0.1:{port}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}/-/ready", folder / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        end(process)
        log.close()


def panels() -> dict[str, list[str]]:
    """The queries of each panel of the dashboard, for all runs, by its title and id."""
    dashboard = json.loads((MONITORING / "langcell-dashboard.json").read_text())
    return {
        f"{panel['title']} ({panel['id']})": [
            target["expr"].replace("$run", ".*") for target in panel["targets"]
        ]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


def metrics_of(query: str) -> set[str]:
    """Names of the series that a query reads."""
    return set(re.findall(r"\bray_\w+(?=[{\[)])", re.sub(r"\bby \([^)]*\)", "", query)))
