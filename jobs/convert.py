"""Make an export of LangCell's released weights, or write an export in their layout."""

import sys
from pathlib import Path

from langcell.recipes import convert
from langcell.recipes.entry import main

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "convert.yaml"
    sys.exit(main(convert.run, __doc__, default, tree=convert.ConvertConfig))
