"""A cluster of three raylets on this machine that loses one with training workers.

`raylets.py RUN_DIR FOLDER OPTIONS STEP HOW`: trains as `driver.py` does; at step STEP a raylet under which a
worker runs is killed (HOW is `kill`), or Ray is told that it will be taken away, as a spot node is, and it is
once stage 2 has a checkpoint (`drain`).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tests.faults.making import Tiny, last_step, train, watched

HEAD = {"num_cpus": 2, "object_store_memory": 128 << 20, "include_dashboard": False}
GRACE_S = 60.0
TRAINER = {"num_cpus": 2, "resources": {"trainer": 2}, "object_store_memory": 128 << 20}


def trains(node: Any) -> bool:
    """Whether a training worker runs under the node's raylet."""
    (raylet,) = node.all_processes["raylet"]
    family = psutil.Process(raylet.process.pid).children(recursive=True)
    return any("RayTrainWorker" in " ".join(process.cmdline()) for process in family)


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


def main() -> None:
    run_dir, folder, options, step, how = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = [cluster.add_node(**TRAINER) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="WARNING")

    def disturb(done: threading.Event) -> None:
        while last_step(Path(run_dir)) < int(step) and not done.is_set():
            done.wait(0.02)
        lost = next(node for node in nodes if trains(node))
        (raylet,) = lost.all_processes["raylet"]
        if how == "drain":
            drain(cluster.address, lost.node_id)
            while not list(Path(run_dir).glob("checkpoints/stage2/*/checkpoint.json")) and not done.is_set():
                done.wait(0.02)
        raylet.process.kill()
        print("a raylet is killed", flush=True)

    with watched(disturb):
        train(Tiny(Path(folder)), Path(run_dir), **json.loads(options))
    print("trained", flush=True)
    ray.shutdown()
    cluster.shutdown()
    os._exit(0)  # what Ray still has to say of the node that is lost is not waited for


if __name__ == "__main__":
    main()
