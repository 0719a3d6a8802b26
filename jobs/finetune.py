"""Fine-tune a trained model on the labelled cells of an .h5ad file: classes, numbers or several labels."""

import sys
from pathlib import Path

from langcell.config import FinetuneConfig
from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "finetune.yaml"
    sys.exit(main(later("finetune:run"), __doc__, preset, tree=FinetuneConfig))
