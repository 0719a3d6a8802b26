"""Train with each part of the objective left out in turn, and compare the zero-shot tables over seeds."""

import sys
from pathlib import Path

from langcell.recipes import ablation
from langcell.recipes.entry import main

if __name__ == "__main__":
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    sys.exit(main(ablation.run, __doc__, demo, tree=ablation.AblationConfig))
