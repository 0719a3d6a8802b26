"""Pre-flight: whether this cluster can run `jobs/pretrain.py` with the same options."""

import sys
from pathlib import Path

from langcell.recipes import doctor
from langcell.recipes.entry import main

if __name__ == "__main__":
    sys.exit(main(doctor.run, __doc__, Path(__file__).parent / "configs" / "demo.yaml"))
