"""Name the cell types of an .h5ad file or of a Census query by a trained model, without labels."""

import sys
from pathlib import Path

from langcell.config import AnnotateConfig
from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "annotate.yaml"
    sys.exit(main(later("annotate:run"), __doc__, preset, tree=AnnotateConfig))
