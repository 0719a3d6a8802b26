"""Train with each part of the objective left out in turn, and compare the zero-shot tables over seeds."""

import sys
from pathlib import Path

from langcell.config import AblationConfig
from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "demo.yaml"
    sys.exit(main(later("ablation:run"), __doc__, preset, tree=AblationConfig))
