"""Prepare a corpus: read a Census, compute beta, write token blocks, texts and the manifest."""

import sys
from pathlib import Path

from langcell.recipes import prepare
from langcell.recipes.entry import main

if __name__ == "__main__":
    sys.exit(main(prepare.run, __doc__, Path(__file__).parent / "configs" / "demo.yaml", plan=prepare.plan))
