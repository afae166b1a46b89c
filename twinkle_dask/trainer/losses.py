"""The losses: a value for each target token, and its derivative with respect to the logprob.

Every loss is a plain sum over tokens and data, so any split into micro-batches and calls gives the
same gradient. In the formulas ``lp`` is the log-probability of the target under the model, ``q``
the input ``logprobs`` (what the sampler recorded), ``A`` the input ``advantages``,
``r = exp(lp - q)``, ``w`` the input ``weights``, 1 where absent, and ``sg`` stops the gradient.

A token with ``w = 0`` adds exactly nothing, whatever its other inputs are; nor does one with
``A = 0``, except under ``dro``, whose penalty stands beside the advantage.

Shapes: T target tokens of any number of data, one after another.
"""

import math
from collections.abc import Mapping
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from twinkle_dask.losses import CLIP_HIGH, CLIP_LOW
from twinkle_dask.types import LossName, LossSpec

ValueAndSlope: TypeAlias = tuple[Tensor, Tensor]

SEQUENCE_LOG_RATIO = "sequence_log_ratio"
"""An input that no datum has: what ``sequence_log_ratios`` gives, for losses at sequence level."""


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
    if spec.name is LossName.CROSS_ENTROPY:
        return _cross_entropy(lp_T, weights_T)
    log_ratio_T, advantages_T = lp_T - inputs["logprobs"], inputs["advantages"]
    counts_T = advantages_T != 0
    match spec.name:
        case LossName.IMPORTANCE_SAMPLING:
            terms = _importance_sampling(log_ratio_T, advantages_T)
        case LossName.PPO:
            bounds = _bound(spec, inputs, CLIP_LOW), _bound(spec, inputs, CLIP_HIGH)
            terms = _clipped_surrogate(log_ratio_T, advantages_T, *bounds)
        case LossName.GSPO:
            bounds = _bound(spec, inputs, CLIP_LOW), _bound(spec, inputs, CLIP_HIGH)
            terms = _clipped_surrogate(inputs[SEQUENCE_LOG_RATIO], advantages_T, *bounds)
        case LossName.CISPO:
            bounds = _bound(spec, inputs, CLIP_LOW), _bound(spec, inputs, CLIP_HIGH)
            terms = _cispo(lp_T, log_ratio_T, advantages_T, *bounds)
        case LossName.DRO:
            counts_T = torch.ones_like(counts_T)
            terms = _dro(lp_T, log_ratio_T, advantages_T, spec.config["beta"])
        case LossName.STABLE_REINFORCE:
            high, kl_coeff = _bound(spec, inputs, CLIP_HIGH), spec.config["kl_coeff"]
            terms = _stable_reinforce(lp_T, log_ratio_T, advantages_T, high, kl_coeff)
        case _:
            assert_never(spec.name)
    if weights_T is not None:
        counts_T &= weights_T != 0
        terms = terms[0] * weights_T, terms[1] * weights_T
    # Where a token does not count its ratio may be infinite, and 0 * inf is NaN.
    return torch.where(counts_T, terms[0], 0.0), torch.where(counts_T, terms[1], 0.0)


def sequence_log_ratios(
    lp_M: Tensor, q_M: Tensor, sequence_M: Tensor, num_sequences: int
) -> Tensor:
    """Mean of ``lp - q`` over the marked tokens M of each sequence; NaN where none is marked."""
    sums_S = lp_M.new_zeros(num_sequences).index_add_(0, sequence_M, lp_M - q_M)
    return sums_S / torch.bincount(sequence_M, minlength=num_sequences)


def _cross_entropy(lp_T: Tensor, weights_T: Tensor | None) -> ValueAndSlope:
    """``-w lp``: linear in w, which may be negative or fractional.

    Tinker's custom losses rest on that linearity: the client sends ``w = -dL/dlp``.
    """
    slope_T = torch.full_like(lp_T, -1.0) if weights_T is None else -weights_T
    return slope_T * lp_T, slope_T


def _importance_sampling(log_ratio_T: Tensor, advantages_T: Tensor) -> ValueAndSlope:
    """``-r A``: the policy gradient with its off-policy correction.

    The derivative of ``r`` is ``r`` itself, so value and slope are the same number.
    Source: Tinker's loss documentation; the objective L^CPI of https://arxiv.org/abs/1707.06347.
    """
    value_T = -torch.exp(log_ratio_T) * advantages_T
    return value_T, value_T


def _clipped_surrogate(
    log_ratio_T: Tensor, advantages_T: Tensor, low: Tensor | float, high: Tensor | float
) -> ValueAndSlope:
    """``-min(r A, clip(r, low, high) A)``; the bounds are ratios, not distances from 1.

    The slope is ``-r A`` where the minimum is the unclipped term (on a tie the two have the same
    slope, or A is 0), else 0: the clipped term is the smaller one only where it is flat.

    ``ppo`` is this with the token's own ratio: equation 7 of https://arxiv.org/abs/1707.06347.
    ``gspo`` is this with ``r = sg(s) * exp(lp - sg(lp))``, where ``log s`` is the mean log ratio of
    the token's sequence: GSPO-token, section 4.3 of https://arxiv.org/abs/2507.18071. Its value is
    ``s`` and its derivative by this token's lp is ``s`` too.
    """
    ratio_T = torch.exp(log_ratio_T)
    plain_T = ratio_T * advantages_T
    clipped_T = _clip(ratio_T, low, high) * advantages_T
    slope_T = torch.where(plain_T <= clipped_T, -plain_T, 0.0)
    return -torch.minimum(plain_T, clipped_T), slope_T


def _cispo(
    lp_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> ValueAndSlope:
    """``-sg(clip(r, low, high)) lp A``: a bounded weight, but no token loses its gradient.

    Source: equation 4 of https://arxiv.org/abs/2506.13585.
    """
    slope_T = -_clip(torch.exp(log_ratio_T), low, high) * advantages_T
    return slope_T * lp_T, slope_T


def _dro(lp_T: Tensor, log_ratio_T: Tensor, advantages_T: Tensor, beta: float) -> ValueAndSlope:
    """``-(lp A - beta / 2 * (lp - q)^2)``: a pull back to the sampler, no ratio.

    Source: Tinker's loss documentation, after https://arxiv.org/abs/2405.19107 and section 2.3 of
    https://arxiv.org/abs/2501.12599.
    """
    value_T = 0.5 * beta * log_ratio_T * log_ratio_T - lp_T * advantages_T
    return value_T, beta * log_ratio_T - advantages_T


def _stable_reinforce(
    lp_T: Tensor, log_ratio_T: Tensor, advantages_T: Tensor, high: Tensor | float, kl_coeff: float
) -> ValueAndSlope:
    """``-sg(c) lp A + kl_coeff * k`` with ``c = min(r, high)``; the objective is our own.

    ``k`` is ``r - 1 - log r`` up to ``r = high``, an estimate of KL(sampler || model) that is never
    negative (k3 in http://joschu.net/blog/kl-approx.html), and its tangent beyond. So the slope of
    ``k`` is ``c - 1``, and the whole slope is bounded for any lp and q:
    ``|slope| <= high |A| + kl_coeff max(1, high - 1)``.
    """
    weight_T = _clip(torch.exp(log_ratio_T), 0.0, high)
    # The smaller of the two logs, so that the exponential cannot overflow. Beyond the bound,
    # k(bound) + (c - 1)(log r - bound), which is c - 1 - bound + (c - 1)(log r - bound).
    log_high = torch.log(high) if isinstance(high, Tensor) else math.log(high)
    bound_T = log_ratio_T.clamp(max=log_high)
    k_T = torch.expm1(bound_T) - bound_T + (weight_T - 1) * (log_ratio_T - bound_T)
    slope_T = -weight_T * advantages_T
    return slope_T * lp_T + kl_coeff * k_T, slope_T + kl_coeff * (weight_T - 1)


def _bound(spec: LossSpec, inputs: Mapping[str, Tensor], name: str) -> Tensor | float:
    """A threshold: token by token if any datum has it so, else the setting."""
    return inputs.get(name, spec.config[name])


def _clip(ratio_T: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return ratio_T.clamp(min=low).clamp(max=high)
