"""The losses: a value for each target token, and its derivative with respect to the logprob.

Every loss is a plain sum over tokens and data, so any split into micro-batches and calls gives the
same gradient. In the formulas ``lp`` is the log-probability of the target under the model, ``q``
the input ``logprobs`` (what the sampler recorded), ``A`` the input ``advantages``,
``r = exp(lp - q)`` and ``w`` the input ``weights``, 1 where absent. A token with ``w = 0`` adds
exactly nothing, whatever its other inputs are.

Shapes: T target tokens of any number of data, one after another.
"""

from collections.abc import Mapping
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from twinkle_dask.types import LossName, LossSpec

ValueAndSlope: TypeAlias = tuple[Tensor, Tensor]


def token_loss(spec: LossSpec, lp_T: Tensor, inputs: Mapping[str, Tensor]) -> ValueAndSlope:
    """Evaluate a loss token by token.

    Args:
        spec: The loss, its config complete (as ``twinkle_dask.losses.loss_spec`` makes it).
        lp_T: float32.
        inputs: float32 (T,) each, by the names of ``twinkle_dask.losses``.

    Returns:
        The loss of each token, and its derivative with respect to ``lp_T``; float32 (T,) both.
    """
    weights_T = inputs.get("weights")
    match spec.name:
        case LossName.CROSS_ENTROPY:
            return _cross_entropy(lp_T, weights_T)
        case LossName.IMPORTANCE_SAMPLING:
            terms = _importance_sampling(lp_T, inputs["logprobs"], inputs["advantages"])
        case LossName.PPO:
            low, high = spec.config["clip_low_threshold"], spec.config["clip_high_threshold"]
            terms = _ppo(lp_T, inputs["logprobs"], inputs["advantages"], low, high)
        case _:
            assert_never(spec.name)
    return terms if weights_T is None else _weighted(terms, weights_T)


def _cross_entropy(lp_T: Tensor, weights_T: Tensor | None) -> ValueAndSlope:
    """``-w lp``: linear in w, which may be negative or fractional.

    Tinker's custom losses rest on that linearity: the client sends ``w = -dL/dlp``.
    """
    slope_T = torch.full_like(lp_T, -1.0) if weights_T is None else -weights_T
    return slope_T * lp_T, slope_T


def _importance_sampling(lp_T: Tensor, q_T: Tensor, advantages_T: Tensor) -> ValueAndSlope:
    """``-r A``: the policy gradient with its off-policy correction.

    The derivative of ``r`` is ``r`` itself, so value and slope are the same number.
    Source: Tinker's loss documentation; the objective L^CPI of https://arxiv.org/abs/1707.06347.
    """
    value_T = -torch.exp(lp_T - q_T) * advantages_T
    return value_T, value_T


def _ppo(lp_T: Tensor, q_T: Tensor, advantages_T: Tensor, low: float, high: float) -> ValueAndSlope:
    """``-min(r A, clip(r, low, high) A)``; the bounds are ratios, not distances from 1.

    The slope is ``-r A`` where the minimum is the unclipped term (on a tie the two have the same
    slope, or A is 0), else 0: the clipped term is the smaller one only where it is flat.
    Source: equation 7 of https://arxiv.org/abs/1707.06347.
    """
    ratio_T = torch.exp(lp_T - q_T)
    plain_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(low, high) * advantages_T
    slope_T = torch.where(plain_T <= clipped_T, -plain_T, 0.0)
    return -torch.minimum(plain_T, clipped_T), slope_T


def _weighted(terms: ValueAndSlope, weights_T: Tensor) -> ValueAndSlope:
    value_T, slope_T = terms
    counts_T = weights_T != 0  # A masked ratio may be infinite, and 0 * inf is NaN.
    return (
        torch.where(counts_T, value_T * weights_T, 0.0),
        torch.where(counts_T, slope_T * weights_T, 0.0),
    )
