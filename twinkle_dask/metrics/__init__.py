"""Metrics by Twinkle's class names, gathered over passes in plain JSON.

``new`` begins one, ``check`` says before a pass whether a batch suits it, ``accumulate`` adds what
a pass gave, ``result`` tells and ``reset`` begins anew. States are JSON, so they lie in a run's
settings and survive a restart. Numpy, no torch.
"""

from twinkle_dask.metrics.base import Facts
from twinkle_dask.metrics.table import (
    ARGUMENTS,
    METRICS,
    accumulate,
    check,
    new,
    reset,
    result,
)

__all__ = ["ARGUMENTS", "METRICS", "Facts", "accumulate", "check", "new", "reset", "result"]
