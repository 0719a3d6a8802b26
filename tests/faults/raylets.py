"""A cluster of several raylets on this machine that loses one of them, and is given another.

`raylets.py RUN_DIR FOLDER OPTIONS STEP BACK`: trains as `driver.py` does; at step STEP the raylet of rank 0's
node is killed, and, where BACK is not 0, a new one joins at step BACK. Prints the nodes that trained.
"""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.faults.making import Tiny, last_step, train, watched

TRAINER = {"num_cpus": 2, "resources": {"trainer": 2}, "object_store_memory": 128 << 20}


def node_of_a_worker() -> str:
    """Id of the node where a training worker lives."""
    from ray.util.state import list_actors

    workers = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return str(workers[0].node_id)


def main() -> None:
    run_dir, folder, options, step, back = sys.argv[1:]
    head = {"num_cpus": 2, "object_store_memory": 128 << 20, "include_dashboard": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(**TRAINER) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="WARNING")

    def disturb(done: threading.Event) -> None:
        while last_step(Path(run_dir)) < int(step):
            done.wait(0.02)
        lost = node_of_a_worker()
        [node] = [node for node in nodes if node.node_id == lost]
        cluster.remove_node(node, allow_graceful=False)
        print("killed the raylet of", lost, flush=True)
        while int(back) and last_step(Path(run_dir)) < int(back) and not done.is_set():
            done.wait(0.02)
        if int(back):
            cluster.add_node(**TRAINER)

    with watched(disturb):
        train(Tiny(Path(folder)), Path(run_dir), **json.loads(options))
    print("trained", flush=True)
    with contextlib.suppress(Exception):
        ray.shutdown()
        cluster.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
