"""Several ranks over gloo, for tests of numerics."""

from langcell.bench.ranks import run_ranks

__all__ = ["run_ranks"]
