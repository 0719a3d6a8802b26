"""Measure a part of langcell on this machine, beside baselines."""

import sys

from langcell.bench.entry import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
