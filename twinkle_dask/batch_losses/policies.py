"""Losses of policies: what was sampled, weighed by its advantage.

By token, ``d = clip(lp - q, -20, 20)`` with q the argument ``old_logps`` (lp itself, without its
gradient, where that is absent), ``r = exp(d)``, A the advantage. The losses differ in what a token
is worth and in how tokens are averaged. Where ``beta`` is above 0 each token adds
``beta (exp(l - lp) - (l - lp) - 1)``, l the argument ``ref_logps``: the estimator k3 of
KL(policy || reference), http://joschu.net/blog/kl-approx.html.
"""

import sys
from collections.abc import Callable
from typing import Final

import numpy as np

from twinkle_dask.batch_losses.batch import (
    Direct,
    Evaluated,
    Float64Array,
    LabelledBatch,
    Objective,
)
from twinkle_dask.batch_losses.numbers import sigmoid
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import CLIP_HIGH, CLIP_LOW
from twinkle_dask.types import Json, LossName, LossSpec

_LARGEST_LOG_RATIO: Final = 20.0

ByToken = Callable[[Float64Array, Float64Array], tuple[Float64Array, Float64Array]]
"""From ratio and advantage: a token's loss, and its derivative by the log ratio."""


def clipped(settings: Json, batch: LabelledBatch, arguments: Json, name: str) -> Objective:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``.

    GRPOLoss (https://arxiv.org/abs/2402.03300, equation 3) averages a row's tokens, then the rows;
    PPOLoss (https://arxiv.org/abs/1707.06347, equation 7) does so with ``seq-mean-token-mean`` and
    averages all tokens with ``token-mean``; so does BNPOLoss (https://arxiv.org/abs/2506.02864);
    DRGRPOLoss (https://arxiv.org/abs/2503.20783) divides by rows times ``max_completion_length``.
    """
    low, high = _bounds(settings)
    inputs = _Inputs(settings, batch, arguments, name, _scales(settings, batch, name))
    by_token = _clip_by_token(low, high)
    if (direct := inputs.on_policy()) is None and inputs.may_clip():
        thresholds = {CLIP_LOW: max(0.0, low), CLIP_HIGH: high}
        direct = inputs.off_policy(LossSpec(name=LossName.PPO, config=thresholds))
    return Objective(evaluate=lambda lp_T: inputs.evaluate(lp_T, by_token), direct=direct)


def gspo(settings: Json, batch: LabelledBatch, arguments: Json, name: str) -> Objective:
    """As GRPOLoss, with ``r = exp(mean of d over the row)``.

    Source: https://arxiv.org/abs/2507.18071, equations 5 and 7.
    """
    inputs = _Inputs(settings, batch, arguments, name, _scales(settings, batch, name))
    by_token = _clip_by_token(*_bounds(settings))

    def evaluate(lp_T: Float64Array) -> Evaluated:
        d_T, moves_T = inputs.log_ratios(lp_T)
        lengths_S = np.maximum(batch.counts_S, 1)
        ratio_T = np.exp(batch.sums_S(d_T) / lengths_S)[batch.row_T]
        loss_T, slope_T = by_token(ratio_T, inputs.advantages_T)
        # Every token of a row moves the ratio of all of them.
        by_row_S = batch.sums_S(slope_T * inputs.scale_T) / lengths_S
        kl_T, kl_slope_T = inputs.penalty(lp_T)
        return Evaluated(
            value=float(((loss_T + kl_T) * inputs.scale_T).sum()),
            slopes_T=by_row_S[batch.row_T] * moves_T + kl_slope_T * inputs.scale_T,
        )

    return Objective(evaluate=evaluate, direct=None)


def sapo(settings: Json, batch: LabelledBatch, arguments: Json, name: str) -> Objective:
    """``-(4 / tau) S(tau (r - 1)) A``, S the logistic function, tau by the sign of A.

    Averaged as GRPOLoss. Source: https://arxiv.org/abs/2511.20347, equations 5 and 6. There is no
    clipping, so ``epsilon`` and ``epsilon_high``, which the class takes, have nothing to do.
    """
    inputs = _Inputs(settings, batch, arguments, name, _scales(settings, batch, name))
    positive, negative = float(settings["tau_pos"]), float(settings["tau_neg"])
    tau_T = np.where(inputs.advantages_T > 0, positive, negative)

    def by_token(ratio_T: Float64Array, advantage_T: Float64Array) -> tuple[Float64Array, ...]:
        gate_T = sigmoid(tau_T * (ratio_T - 1))
        slope_T = -4.0 * gate_T * (1 - gate_T) * ratio_T * advantage_T
        return -(4.0 / tau_T) * gate_T * advantage_T, slope_T

    return Objective(
        evaluate=lambda lp_T: inputs.evaluate(lp_T, by_token),  # pyright: ignore[reportArgumentType]
        direct=inputs.on_policy(),
    )


def cispo(settings: Json, batch: LabelledBatch, arguments: Json, name: str) -> Objective:
    """``-min(r, 1 + epsilon) A lp``, the ratio without its gradient.

    Divided by ``num_items_in_batch`` where the call says it, else by the number of targets.
    Source: https://arxiv.org/abs/2506.13585, equations 4 and 5. ``epsilon_high``, which the class
    takes, has nothing to do: as in Twinkle, ``epsilon`` bounds from above.
    """
    inputs = _Inputs(settings, batch, arguments, name, _scales_cispo(batch, arguments))
    high = 1.0 + float(settings["epsilon"])

    def evaluate(lp_T: Float64Array) -> Evaluated:
        d_T, _ = inputs.log_ratios(lp_T)
        weight_T = -np.minimum(np.exp(d_T), high) * inputs.advantages_T
        kl_T, kl_slope_T = inputs.penalty(lp_T)
        return Evaluated(
            value=float(((weight_T * lp_T + kl_T) * inputs.scale_T).sum()),
            slopes_T=(weight_T + kl_slope_T) * inputs.scale_T,
        )

    direct = inputs.on_policy()
    if direct is None:
        thresholds = {CLIP_LOW: 0.0, CLIP_HIGH: high}
        direct = inputs.off_policy(LossSpec(name=LossName.CISPO, config=thresholds))
    return Objective(evaluate=evaluate, direct=direct)


class _Inputs:
    """What a call says of the targets, checked against the batch."""

    def __init__(
        self,
        settings: Json,
        batch: LabelledBatch,
        arguments: Json,
        name: str,
        scale_T: Float64Array,
    ) -> None:
        advantages = arguments.get("advantages")
        if advantages is None:
            raise InvalidRequest(
                f"{name} needs 'advantages': one number for each row, or one for each target."
            )
        self.advantages_T = batch.align(advantages, "advantages", broadcast=True)
        old = arguments.get("old_logps")
        self.old_T = None if old is None else batch.align(old, "old_logps", broadcast=True)
        self._beta = float(settings["beta"])
        self._reference_T: Float64Array | None = None
        if self._beta > 0:
            reference = arguments.get("ref_logps")
            if reference is None:
                raise InvalidRequest(
                    f"{name} with beta {self._beta:g} needs 'ref_logps', the reference's "
                    "log-probabilities (forward_only with disable_lora=True gives them)."
                )
            self._reference_T = batch.align(reference, "ref_logps", broadcast=True)
        self.scale_T = scale_T

    def log_ratios(self, lp_T: Float64Array) -> tuple[Float64Array, Float64Array]:
        """``d``, and its derivative by lp: 1, or 0 where it is clipped."""
        d_T = np.zeros_like(lp_T) if self.old_T is None else lp_T - self.old_T
        bounded_T = np.clip(d_T, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        return bounded_T, (bounded_T == d_T).astype(np.float64)

    def penalty(self, lp_T: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The term of ``beta``, and its slope."""
        if self._reference_T is None:
            return np.zeros_like(lp_T), np.zeros_like(lp_T)
        up_T = self._reference_T - lp_T
        return self._beta * (np.expm1(up_T) - up_T), -self._beta * np.expm1(up_T)

    def evaluate(self, lp_T: Float64Array, by_token: ByToken) -> Evaluated:
        """The sum over tokens of loss and penalty, scaled."""
        d_T, moves_T = self.log_ratios(lp_T)
        loss_T, slope_T = by_token(np.exp(d_T), self.advantages_T)
        kl_T, kl_slope_T = self.penalty(lp_T)
        return Evaluated(
            value=float(((loss_T + kl_T) * self.scale_T).sum()),
            slopes_T=(slope_T * moves_T + kl_slope_T) * self.scale_T,
        )

    def on_policy(self) -> Direct | None:
        """Without ``old_logps`` the ratio is 1, and the slope -A whatever the scores are."""
        if self.old_T is not None or self._beta > 0:
            return None
        weights_T = self.advantages_T * self.scale_T
        return Direct(loss=LossSpec(name=LossName.CROSS_ENTROPY), inputs={"weights": weights_T})

    def may_clip(self) -> bool:
        """Whether a log ratio cannot pass 20: lp is never above 0.

        The core does not bound it. Below -20 the bound makes a slope of 0 of one under 2e-9 A.
        """
        return self.old_T is not None and bool((self.old_T >= -_LARGEST_LOG_RATIO).all())

    def off_policy(self, loss: LossSpec) -> Direct | None:
        """A loss of the core with these ratios, which knows no penalty."""
        if self._beta > 0 or self.old_T is None:
            return None
        inputs = {
            "logprobs": self.old_T,
            "advantages": self.advantages_T,
            "weights": self.scale_T,
        }
        return Direct(loss=loss, inputs=inputs)


def _bounds(settings: Json) -> tuple[float, float]:
    epsilon, high = float(settings["epsilon"]), settings["epsilon_high"]
    return 1.0 - epsilon, 1.0 + (epsilon if high is None else float(high))


def _clip_by_token(low: float, high: float) -> ByToken:
    def by_token(
        ratio_T: Float64Array, advantage_T: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        plain_T = ratio_T * advantage_T
        bounded_T = np.clip(ratio_T, low, high) * advantage_T
        return -np.minimum(plain_T, bounded_T), np.where(plain_T <= bounded_T, -plain_T, 0.0)

    return by_token


def _scales(settings: Json, batch: LabelledBatch, name: str) -> Float64Array:
    """What each token's loss is multiplied by, so that the sum is the average of its class."""
    if name == "DRGRPOLoss":
        return np.full(
            batch.num_targets, 1.0 / (batch.num_rows * int(settings["max_completion_length"]))
        )
    if name == "BNPOLoss" or settings.get("loss_agg_mode") == "token-mean":
        return np.full(batch.num_targets, 1.0 / max(1, batch.num_targets))
    return 1.0 / (batch.num_rows * np.maximum(batch.counts_S, 1))[batch.row_T]


def _scales_cispo(batch: LabelledBatch, arguments: Json) -> Float64Array:
    given = arguments.get("num_items_in_batch")
    if given is None:
        return np.full(batch.num_targets, 1.0 / max(1, batch.num_targets))
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given <= sys.float_info.max:
        raise InvalidRequest("'num_items_in_batch' must be a number above 0.")
    return np.full(batch.num_targets, 1.0 / given)
