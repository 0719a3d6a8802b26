"""Name the cell types of an .h5ad file or of a Census query by a trained model, without labels."""

import sys
from pathlib import Path

from langcell.recipes import annotate
from langcell.recipes.entry import main

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "annotate.yaml"
    sys.exit(main(annotate.run, __doc__, default, tree=annotate.AnnotateConfig))
