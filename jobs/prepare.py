"""Prepare a corpus: read a Census, compute beta, write token blocks, texts and the manifest."""

import sys
from pathlib import Path

from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "demo.yaml"
    sys.exit(main(later("prepare:run"), __doc__, preset, plan=later("prepare:plan")))
