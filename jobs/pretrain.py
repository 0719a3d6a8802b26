"""Pretrain LangCell: prepare the corpus, train both stages, judge, export, report."""

import sys
from functools import partial
from pathlib import Path

from langcell.recipes import forecast, pretrain
from langcell.recipes.entry import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    plan = partial(forecast.plan, records=HERE / "records")
    sys.exit(main(pretrain.run, __doc__, HERE / "configs" / "demo.yaml", plan=plan))
