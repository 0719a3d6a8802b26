"""Both stages of a tiny run by a process of its own: `driver.py RUN_DIR FOLDER OPTIONS`, on the Ray that
RAY_ADDRESS names. FOLDER: of the prepared corpus; OPTIONS: of `train`, as JSON."""

import json
import sys
from pathlib import Path

import ray

from langcell.errors import RunError
from tests.faults.making import Tiny, train

if __name__ == "__main__":
    run_dir, folder, options = sys.argv[1:]
    ray.init(log_to_driver=True, logging_level="WARNING")
    try:
        train(Tiny(Path(folder)), Path(run_dir), **json.loads(options))
    except RunError as error:
        sys.exit(f"error: {error}")
    print("trained", flush=True)
