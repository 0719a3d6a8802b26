"""The pictures of a running job in the README, taken anew: `python -m tests.jobs.pictures`.

A head, Prometheus and the demo as the tests start them; Debian's Chromium without a screen opens the job's
page of the Ray dashboard, and Prometheus's graph page with queries of our dashboard's panels. Needs
`prometheus` and `chromium` on PATH, and some minutes.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from ray.job_submission import JobSubmissionClient

from tests.jobs.head import ROOT, demo_job, running_head
from tests.jobs.prometheus import panels, running_prometheus

PICTURES = ROOT / "jobs" / "pictures"
SHOWN = ("Losses", "Cells per second")
ENOUGH = 0.8
"""Share of the run after which the pictures are taken."""
WIDTH, COLOURS = 1200, 64


def main() -> None:
    began = time.time()
    # At 0.5 s, as the tests have it, a busy machine leaves gaps in the curves.
    with tempfile.TemporaryDirectory() as name, running_head(RAY_metrics_report_interval_ms="5000") as head:
        folder = Path(name)
        client = JobSubmissionClient(head.dashboard)
        with running_prometheus(head, folder) as prometheus:
            long = ("--run.name=demo", "--train.stage1_epochs=4", "--train.stage2_epochs=8")
            head.submit("demo", *demo_job(folder, *long))
            while not prometheus.get("query", query=f"ray_langcell_done > {ENOUGH}")["result"]:
                if client.get_job_status("demo").is_terminal():
                    raise SystemExit(client.get_job_logs("demo")[-4000:])
                time.sleep(1)
            seconds = int(time.time() - began)
            graphs = {
                f"g{i}.{key}": value
                for i, query in enumerate(query_of(title) for title in SHOWN)
                for key, value in {
                    "expr": query,
                    "tab": 0,
                    "range_input": f"{seconds}s",
                    "step_input": 2,
                }.items()
            }
            photograph(f"{prometheus.url}/graph?{urlencode(graphs)}", "prometheus.png", height=1600)
            photograph(f"{head.dashboard}/#/jobs/demo", "ray-dashboard.png", height=1000)
            client.stop_job("demo")


def query_of(title: str) -> str:
    (query,) = next(queries for name, queries in panels().items() if name.rpartition(" ")[0] == title)
    return query


def photograph(url: str, name: str, height: int) -> None:
    """The page as it looks after 20 s of its own clock, in few colours."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={WIDTH},{height}", "--virtual-time-budget=20000", "--timeout=60000"]
    subprocess.run(
        [*command, f"--screenshot={PICTURES / name}", url], check=True, capture_output=True, timeout=180
    )
    with Image.open(PICTURES / name) as picture:
        picture.convert("RGB").quantize(COLOURS).save(PICTURES / name, optimize=True)


if __name__ == "__main__":
    main()
