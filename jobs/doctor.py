"""Pre-flight: whether this cluster can run `jobs/pretrain.py` with the same options."""

import sys
from pathlib import Path

from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "demo.yaml"
    sys.exit(main(later("doctor:run"), __doc__, preset))
