"""Pretrain LangCell: prepare the corpus, train both stages, judge, export, report."""

import sys
from pathlib import Path

from langcell.recipes import pretrain
from langcell.recipes.entry import main

if __name__ == "__main__":
    sys.exit(main(pretrain.run, __doc__, Path(__file__).parent / "configs" / "demo.yaml"))
