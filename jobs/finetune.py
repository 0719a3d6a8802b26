"""Fine-tune a trained model on the labelled cells of an .h5ad file: classes, numbers or several labels."""

import sys
from pathlib import Path

from langcell.recipes import finetune
from langcell.recipes.entry import main

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "finetune.yaml"
    sys.exit(main(finetune.run, __doc__, default, tree=finetune.FinetuneConfig))
