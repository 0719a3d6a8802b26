"""Start the autoscaling cluster of `local.yaml` on this machine; ctrl-C ends it.

What `ray up` does for a cloud: tells the autoscaler where its head is, and starts the head. Options are those
of `ray start` (`--port`, `--dashboard-port`, `--temp-dir`, ...). Nothing answers without a token, which is
made in the home folder where there is none yet, unless RAY_AUTH_MODE says otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

CONFIG = Path(__file__).with_name("local.yaml")
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, default=6379, help="port of the head")
    parser.add_argument(
        "--idle-timeout-minutes", type=float, help="when an idle node goes; default: that of local.yaml"
    )
    options, others = parser.parse_known_args()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        command = [str(RAY), "get-auth-token", "--generate"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # it prints the token
    config = yaml.safe_load(CONFIG.read_text())
    if options.idle_timeout_minutes is not None:
        config["idle_timeout_minutes"] = options.idle_timeout_minutes
    config["provider"] |= {
        "gcs_address": f"{get_node_ip_address()}:{options.port}",
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(config, file)
    start = [str(RAY), "start", "--head", "--block", "--num-cpus=0", "--object-store-memory=200000000"]
    start += [f"--port={options.port}", f"--autoscaling-config={file.name}", *others]
    os.execv(RAY, start)


if __name__ == "__main__":
    main()
