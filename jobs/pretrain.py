"""Pretrain LangCell: prepare the corpus, train both stages, judge, export, report."""

import sys
from pathlib import Path

from langcell.recipes.entry import later, main

HERE = Path(__file__).parent

if __name__ == "__main__":
    plan = later("forecast:plan", records=HERE / "records")
    sys.exit(main(later("pretrain:run"), __doc__, HERE / "configs" / "demo.yaml", plan=plan))
