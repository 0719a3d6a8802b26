"""Run the main job over several seeds and average its zero-shot tables."""

import sys
from pathlib import Path

from langcell.recipes import seeds
from langcell.recipes.entry import main

if __name__ == "__main__":
    sys.exit(main(seeds.run, __doc__, Path(__file__).parent / "configs" / "demo.yaml"))
