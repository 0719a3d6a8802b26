"""Run the main job over several seeds and average its zero-shot tables."""

import sys
from pathlib import Path

from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "demo.yaml"
    sys.exit(main(later("seeds:run"), __doc__, preset))
