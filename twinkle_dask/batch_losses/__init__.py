"""Losses by class name, which need a batch as a whole: pairs, means, groups.

``loss_spec`` checks what a tenant sets; ``objective`` and ``contrast`` bind a loss to a batch and
the arguments of a call. They are numpy, in float64, and know no model: from scores they give the
value and its slopes, and ``operations.batch_training`` makes a gradient of these with the losses of
the core (``twinkle_dask.losses``), which are sums over tokens. No torch.
"""

from twinkle_dask.batch_losses.batch import (
    Direct,
    Evaluated,
    Float64Array,
    LabelledBatch,
    Objective,
)
from twinkle_dask.batch_losses.contrastive import contrast
from twinkle_dask.batch_losses.specs import IGNORED_LABEL, LOSSES, BatchLossSpec, loss_spec
from twinkle_dask.batch_losses.table import ARGUMENTS, objective

__all__ = [
    "ARGUMENTS",
    "IGNORED_LABEL",
    "LOSSES",
    "BatchLossSpec",
    "Direct",
    "Evaluated",
    "Float64Array",
    "LabelledBatch",
    "Objective",
    "contrast",
    "loss_spec",
    "objective",
]
