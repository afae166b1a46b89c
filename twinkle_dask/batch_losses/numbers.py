"""Functions that hold for any finite number, in float64."""

import math
from typing import Final

import numpy as np

from twinkle_dask.batch_losses.batch import Float64Array

_LOG_2: Final = math.log(2.0)


def log_sigmoid(x: Float64Array) -> Float64Array:
    """``log(1 / (1 + exp(-x)))``, without overflow."""
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Float64Array) -> Float64Array:
    """Its exponential."""
    return np.exp(log_sigmoid(x))


def log_one_minus_exp(x: Float64Array) -> Float64Array:
    """``log(1 - exp(x))`` for negative x, by the branch that cancels less.

    Source: https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    near, far = np.maximum(x, -_LOG_2), np.minimum(x, -_LOG_2)
    return np.where(x > -_LOG_2, np.log(-np.expm1(near)), np.log1p(-np.exp(far)))


def log_softmax(x: Float64Array) -> Float64Array:
    """Along the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
