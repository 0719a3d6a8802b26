"""A cluster of three raylets on this machine that loses one.

`raylets.py RUN_DIR FOLDER OPTIONS STEP HOW`: trains as `driver.py` does; at step STEP, by HOW,

- kill: a raylet under which a worker runs is killed, and with it its workers;
- return: the same, and some steps after the run has gone on another node joins, while the worker is held:
  without that the run would be over before the node is there;
- drain: Ray is told that such a node will be taken away, as a spot node is, and it is once a checkpoint was
  made after that;
- head: the node of head, controller and driver is lost; the others live on, their pids are printed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tests.faults.making import Tiny, last_step, train

HEAD = {"num_cpus": 2, "object_store_memory": 128 << 20, "include_dashboard": False}
GRACE_S = 60.0
TRAINER = {"num_cpus": 2, "resources": {"trainer": 2}, "object_store_memory": 128 << 20}


def raylet_of(node: Any) -> subprocess.Popen[bytes]:
    (raylet,) = node.all_processes["raylet"]
    process: subprocess.Popen[bytes] = raylet.process
    return process


def trainers(node: Any) -> list[psutil.Process]:
    """The training workers under the node's raylet."""
    found = []
    for process in psutil.Process(raylet_of(node).pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray ends idle ones
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def drain(address: str, node_id: str) -> None:
    """Tell Ray that a node will be taken away, as an autoscaler does."""
    accepted, why = GcsClient(address).drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test takes it away",
        int((time.time() + GRACE_S) * 1000),
    )
    assert accepted, why
    print("a node is drained", flush=True)


def newest(run: Path) -> int:
    """Step of the newest whole checkpoint of stage 2; 0: there is none."""
    whole = run.glob("checkpoints/stage2/step-*/checkpoint.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in whole), default=0)


def main() -> None:
    run_dir, folder, options, step, how = sys.argv[1:]
    run = Path(run_dir)
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = [cluster.add_node(**TRAINER) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="WARNING")

    # Nodes join from the main thread alone.
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(train, Tiny(Path(folder)), run, **json.loads(options))

        def wait_until(true: Callable[[], Any]) -> None:
            while not trained.done() and not true():
                time.sleep(0.02)

        wait_until(lambda: last_step(run) >= int(step))
        if how == "head":
            print("alive:", *(raylet_of(node).pid for node in nodes), flush=True)
            for processes in cluster.head_node.all_processes.values():
                for process in processes:
                    process.process.kill()
            os._exit(9)
        lost = next(node for node in nodes if trainers(node))
        if how == "drain":
            drain(cluster.address, lost.node_id)
            wait_until(lambda: newest(run) > int(step))
        raylet_of(lost).kill()
        print("a raylet is killed", flush=True)
        if how == "return":
            (left,) = (node for node in nodes if node is not lost)
            wait_until(lambda: Tiny.recoveries(run) and last_step(run) > Tiny.recoveries(run)[0]["step"] + 3)
            if not trained.done():
                (worker,) = trainers(left)
                worker.suspend()
                try:
                    cluster.add_node(**TRAINER)
                finally:
                    worker.resume()
        trained.result()
    print("trained", flush=True)
    ray.shutdown()
    cluster.shutdown()
    os._exit(0)  # what Ray still has to say of the node that is lost is not waited for


if __name__ == "__main__":
    main()
