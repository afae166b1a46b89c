"""What a forward_backward tells besides its logprobs: how far the policy has moved, and the like.

A client may have cut a batch into requests, and combines their metrics by suffix: ``:sum`` by
adding, ``:max`` as it says, ``:mean`` weighted by the number of data. So that the last is exact
too, every mean here is one over data, of each datum's mean over its loss tokens.

Loss tokens are those that the loss counts: ``weights`` is not 0, and ``advantages`` is not 0 where
a loss is proportional to it. A datum without any counts as one whose policy has not moved: a ratio
of 1, and 0 for the rest. Log ratios are limited to +-80 here, so that every metric is finite.

Shapes: D data, T target tokens of all of them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.losses import CLIP_HIGH, CLIP_LOW, LOSSES, SEQUENCE_RATIO_MASK
from twinkle_dask.trainer.mixed_loss import joined_input
from twinkle_dask.types import Datum, Float32Array, LossName, LossSpec

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_LOG_RATIO_LIMIT = 80.0


def loss_metrics(
    spec: LossSpec,
    data: Sequence[Datum],
    logprobs: Sequence[Float32Array],
    losses: Sequence[float],
) -> dict[str, float]:
    """Metrics of a batch under one loss; the names depend on nothing but the loss.

    Args:
        spec: The loss.
        data: At least one, each with at least one target.
        logprobs: Per datum, of the shape of its targets.
        losses: Per datum.
    """
    means = _Means(data, _counts(spec, data))
    metrics = {
        "loss:sum": float(sum(losses)),
        "tokens:sum": float(sum(len(datum.tokens) for datum in data)),
        "loss_tokens:sum": float(means.num_D.sum()),
        "loss_per_token:mean": float((np.asarray(losses) / np.maximum(means.num_D, 1)).mean()),
    }
    if LOSSES[spec.name].off_policy:
        lp_T = np.concatenate([array.ravel() for array in logprobs])
        metrics |= _off_policy(spec, data, lp_T, means)
    return metrics


def custom_metrics(
    data: Sequence[Datum], losses: Sequence[float], said: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Metrics of a batch under a custom loss: its own, combined over data as their suffix says.

    Args:
        data: At least one.
        losses: Per datum.
        said: Per datum, the loss's own metrics, with the same names for each.
    """
    metrics = {
        "loss:sum": float(sum(losses)),
        "tokens:sum": float(sum(len(datum.tokens) for datum in data)),
    }
    for name in said[0]:
        total = sum(own[name] for own in said)
        metrics[name] = total / len(data) if name.endswith(":mean") else total
    return metrics


class _Means:
    """Means over the loss tokens of each datum."""

    def __init__(self, data: Sequence[Datum], counts_T: BoolArray) -> None:
        self.size_D = np.array([datum.target_tokens.size for datum in data])
        self._starts_D = np.cumsum(self.size_D) - self.size_D
        self.counts_T = counts_T
        self.num_D = self._sums(counts_T)

    def _sums(self, values_T: NDArray[np.generic]) -> Float64Array:
        return np.add.reduceat(values_T, self._starts_D, dtype=np.float64)

    def per_datum(self, values_T: NDArray[np.generic], marked_T: BoolArray) -> Float64Array:
        """Each datum's mean over marked tokens; 0 where there is none."""
        sums_D = self._sums(np.where(marked_T, values_T, 0))
        return sums_D / np.maximum(self._sums(marked_T), 1)

    def mean(self, values_T: NDArray[np.generic], missing: float = 0.0) -> float:
        """Mean over data; ``missing`` for a datum without loss tokens."""
        means_D = self.per_datum(values_T, self.counts_T)
        return float(np.where(self.num_D > 0, means_D, missing).mean())


def _counts(spec: LossSpec, data: Sequence[Datum]) -> BoolArray:
    counts_T = joined_input(data, "weights", spec) != 0
    terms = LOSSES[spec.name]
    if "advantages" in terms.required and spec.name is not LossName.DRO:
        counts_T &= joined_input(data, "advantages", spec) != 0
    return counts_T


def _off_policy(
    spec: LossSpec, data: Sequence[Datum], lp_T: Float32Array, means: _Means
) -> dict[str, float]:
    q_T = joined_input(data, "logprobs", spec)
    with np.errstate(invalid="ignore"):  # Where a token does not count, q may be anything.
        raw_T = (lp_T - q_T).astype(np.float64)
    counts_T = means.counts_T
    log_ratio_T = _limited(raw_T, counts_T)
    # KL(sampler || model) by its samples; both from http://joschu.net/blog/kl-approx.html.
    k3_T = np.expm1(log_ratio_T) - log_ratio_T
    if LOSSES[spec.name].sequence_level:
        marked_T = joined_input(data, SEQUENCE_RATIO_MASK, spec) != 0
        sequence_D = means.per_datum(_limited(raw_T, marked_T), marked_T)
        ratio_T = np.exp(np.repeat(sequence_D, means.size_D))
    else:
        ratio_T = np.exp(log_ratio_T)
    metrics = {
        "kl_k1:mean": means.mean(-log_ratio_T),
        "kl_k3:mean": means.mean(k3_T),
        "ratio:mean": means.mean(ratio_T, missing=1.0),
        "ratio:max": float(ratio_T[counts_T].max(initial=0.0)) if counts_T.any() else 1.0,
        "sampler_entropy:mean": means.mean(-q_T),
    }
    if CLIP_HIGH in spec.config:
        metrics["clip_fraction:mean"] = means.mean(_clipped(spec, data, ratio_T))
    return metrics


def _limited(log_ratio_T: Float64Array, marked_T: BoolArray) -> Float64Array:
    return np.where(marked_T, log_ratio_T, 0.0).clip(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)


def _clipped(spec: LossSpec, data: Sequence[Datum], ratio_T: Float64Array) -> BoolArray:
    """Where a threshold changed the gradient."""
    above_T = ratio_T > joined_input(data, CLIP_HIGH, spec)
    if CLIP_LOW not in spec.config:
        return above_T
    below_T = ratio_T < joined_input(data, CLIP_LOW, spec)
    if spec.name is LossName.CISPO:
        return above_T | below_T
    # The clipped surrogate is only flat beyond the bound that the advantage pushes to.
    advantages_T = joined_input(data, "advantages", spec)
    return (above_T & (advantages_T > 0)) | (below_T & (advantages_T < 0))
