"""Whether this container is in order: what HEALTHCHECK runs. Exit code 1 and a line say what is not.

A container is a node of a cluster, where `ray start` left the cluster's address, or a job of its own. A node
is asked by the health page of its dashboard agent, which looks at the raylet and, on the head, at the GCS,
and needs no token. `ray health-check` would ask the head from every node and say nothing of the node's own
raylet. A job of its own is in order while its package can be imported.
"""

import importlib
import os
import sys
from http.client import HTTPConnection, HTTPException
from pathlib import Path

CLUSTER = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
"""Written by `ray start`, removed by `ray stop`."""
AGENT = 52365
"""Port of the dashboard agent, unless `ray start` is told another."""


def trouble(cluster: Path = CLUSTER, port: int = AGENT) -> str | None:
    """What is wrong here; None: nothing."""
    if not cluster.exists():
        try:
            importlib.import_module("langcell")
        except ImportError as error:
            return str(error)
        return None
    agent = HTTPConnection("127.0.0.1", port, timeout=5)  # of this node: no proxy lies between
    try:
        agent.request("GET", "/api/healthz")
        answer = agent.getresponse()
        text = answer.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        return f"the node's agent does not answer on port {port}: {error}"
    finally:
        agent.close()
    return None if answer.status == 200 else f"{answer.status}: {text}"


if __name__ == "__main__":
    sys.exit(trouble())
