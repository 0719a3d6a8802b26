"""Make an export of LangCell's released weights, or write an export in their layout."""

import sys
from pathlib import Path

from langcell.config import ConvertConfig
from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "convert.yaml"
    sys.exit(main(later("convert:run"), __doc__, preset, tree=ConvertConfig))
