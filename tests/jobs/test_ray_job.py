"""The main job as a cluster user runs it: `ray start --head`, `ray job submit`, watched by Prometheus."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobStatus, JobSubmissionClient

from langcell.storage import open_root
from langcell.train import metrics
from tests.jobs.head import ROOT, Head, demo_job, running_head
from tests.jobs.prometheus import MONITORING, Prometheus, metrics_of, panels, running_prometheus

GAUGES = {
    "ray_langcell_loss",
    "ray_langcell_cells_per_s",
    "ray_langcell_tokens_per_s",
    "ray_langcell_data_wait",
}
EMPTY = {
    "MFU": "the peak of a CPU is not known",
    "GPU utilisation": "no GPU",
    "GPUs": "no GPU",
}
"""Panels that may show nothing where tests run."""
MINUTES = 60.0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@dataclass(frozen=True)
class Watched:
    """A job that has ended: its run directory and log, langcell's gauges that stood on the node's endpoint
    meanwhile (name -> label set -> last value), and the Prometheus that scraped it, where there is one."""

    run: Path
    log: str
    seen: dict[str, dict[str, float]]
    prometheus: Prometheus | None
    began: float
    ended: float


@pytest.fixture(scope="module")
def watched(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    client, began = JobSubmissionClient(head.dashboard), time.time()
    seen: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        prometheus = None
        if shutil.which("prometheus"):
            prometheus = stack.enter_context(running_prometheus(head, folder))
        head.submit("watched", *demo_job(folder, "--run.trackers=[tensorboard]"))
        deadline = time.monotonic() + 18 * MINUTES
        while not (status := client.get_job_status("watched")).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs("watched")[-4000:]
            for name, values in scrape(head).items():
                seen.setdefault(name, {}).update(values)
            time.sleep(1)
        log = client.get_job_logs("watched")
        assert status == JobStatus.SUCCEEDED, f"{client.get_job_info('watched').message}\n{log[-4000:]}"
        yield Watched(folder / "watched", log, seen, prometheus, began, time.time())


def scrape(head: Head) -> dict[str, dict[str, float]]:
    """langcell's gauges that stand on the node's endpoint now: name -> label set -> value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(requests.get(head.metrics, timeout=10).text):
        for sample in family.samples:
            if sample.name.startswith("ray_langcell_"):
                labels = {k: v for k, v in sample.labels.items() if k in ("run", "stage", "loss", "pass")}
                found.setdefault(sample.name, {})[json.dumps(labels, sort_keys=True)] = sample.value
    return found


@pytest.mark.slow
def test_submitted_job_trains_and_says_how(watched: Watched) -> None:
    run, seen = watched.run, watched.seen
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] > 0
    assert Path(summary["export"]).is_dir()
    assert f"summary  {run / 'summary.json'}" in watched.log

    assert set(seen) >= GAUGES, f"on the endpoint: {sorted(seen)}"
    assert all(math.isfinite(value) for values in seen.values() for value in values.values())
    rates = [*seen["ray_langcell_cells_per_s"].values(), *seen["ray_langcell_tokens_per_s"].values()]
    assert all(rate > 0 for rate in rates)
    assert all(0 <= wait <= 1 for wait in seen["ray_langcell_data_wait"].values())
    labels = [json.loads(key) for key in seen["ray_langcell_loss"]]
    assert {label["run"] for label in labels} == {"watched"}
    cells = {label["loss"] for label in labels if label["stage"] == "1"}
    both = {label["loss"] for label in labels if label["stage"] == "2"}
    assert cells >= {"mgm", "cc"}
    assert not cells & {"ct", "ctm"}, "stage 1 sees no text"
    assert both >= {"mgm", "cc", "ct", "ctm"}
    first, second = seen["ray_langcell_done"].values()
    assert 0 < first <= 0.5 < second <= 1, "stage 1 is the first half of the run"
    for stage in seen["ray_langcell_checkpoint_time_seconds"].values():
        assert watched.began < stage < watched.ended
    passes = {json.loads(key)["pass"]: value for key, value in seen["ray_langcell_prepare_slices"].items()}
    assert passes.keys() == {"beta: histogram", "beta: medians", "tokens"}
    totals = seen["ray_langcell_prepare_slices_total"].values()
    assert list(passes.values()) == list(totals), "a pass that is through keeps its values"


@pytest.mark.slow
def test_tensorboard_has_every_step_of_both_stages(watched: Watched) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(watched.run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = metrics.read(open_root(str(watched.run)), metrics.METRICS)
    for name in ("mgm", "ct", "data_wait"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name])) for row in rows if name in row]


@pytest.mark.slow
def test_every_panel_shows_data_and_every_alert_is_judged(watched: Watched) -> None:
    prometheus, between = watched.prometheus, (watched.began, watched.ended)
    if prometheus is None:
        pytest.skip("no prometheus on PATH (Debian: apt-get install prometheus)")
    empty = {
        title
        for title, queries in panels().items()
        if not all(prometheus.over(query, *between) for query in queries)
    }
    assert {title.rpartition(" ")[0] for title in empty} <= EMPTY.keys()

    (group,) = prometheus.get("rules")["groups"]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in rules]
    for rule in group["rules"]:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
    for metric in set().union(*(metrics_of(rule["expr"]) for rule in rules)):
        assert prometheus.over(metric, *between), f"an alert reads {metric}, which nothing sets"
    assert prometheus.over('ALERTS{alertstate="firing"}', *between) == []


@pytest.mark.slow
def test_upload_leaves_environment_and_runs_behind(head: Head, tmp_path: Path) -> None:
    """`--working-dir .` of a checkout in use: .gitignore is honoured; Ray refuses more than 500 MiB."""
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in (".venv/lib/torch.so", "runs/demo/export/model.safetensors", ".hypothesis/examples"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"0")

    client = JobSubmissionClient(head.dashboard)
    job = client.submit_job(entrypoint="find . -type f", runtime_env={"working_dir": str(checkout)})
    deadline = time.monotonic() + 4 * MINUTES
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(job)
    there = {Path(line) for line in client.get_job_logs(job).splitlines() if line.startswith("./")}
    assert {Path("jobs/pretrain.py"), Path("langcell/config.py"), Path("jobs/configs/demo.yaml")} <= there
    assert not {path.parts[0] for path in there} & {".venv", "runs", ".git", ".hypothesis"}
