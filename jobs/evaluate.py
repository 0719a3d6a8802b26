"""Measure a trained model: zero-shot, few-shot, fine-tuning, retrieval, integration, clusters, pathways."""

import sys
from pathlib import Path

from langcell.config import EvaluateConfig
from langcell.recipes.entry import later, main

if __name__ == "__main__":
    preset = Path(__file__).parent / "configs" / "evaluate.yaml"
    sys.exit(main(later("evaluate:run"), __doc__, preset, tree=EvaluateConfig))
