"""Losses of pairs: rows alternate between a chosen and a rejected answer.

``c`` and ``r`` are the log-probabilities of a pair's answers, sums over their targets, and ``c0``,
``r0`` those of the reference; ``S`` is the logistic function. All are means over the pairs.
"""

import numpy as np

from twinkle_dask.batch_losses.batch import Evaluated, Float64Array, LabelledBatch, Objective
from twinkle_dask.batch_losses.numbers import log_one_minus_exp, log_sigmoid, sigmoid
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json

_LARGEST_MEAN_LOGPROB = -1e-7


def dpo(settings: Json, batch: LabelledBatch, arguments: Json) -> Objective:
    """Direct preference optimisation, ``m = beta ((c - c0) - (r - r0))``.

    ``sigmoid``: ``-log S(m)``, smoothed ``-(1 - e) log S(m) - e log S(-m)``
    (https://arxiv.org/abs/2305.18290, equation 7; https://ericmitchell.ai/cdpo.pdf). ``hinge``:
    ``max(0, 1 - m)`` (https://arxiv.org/abs/2305.10425). ``ipo``: ``(m - 1 / (2 beta))^2``, after
    https://arxiv.org/abs/2310.12036, but with Twinkle's m, which has beta in it. ``kto_pair``:
    ``1 - S(beta (c - c0)) + S(beta (r - r0))``, after https://arxiv.org/abs/2402.01306.
    With ``reference_free`` c0 and r0 are 0. ``sft_weight`` adds so much of the mean cross entropy
    of the chosen answers.
    """
    _pairs(batch, "DPOLoss")
    beta, smoothing = float(settings["beta"]), float(settings["label_smoothing"])
    reference_S = np.zeros(batch.num_rows)
    if not settings["reference_free"]:
        found_S = reference_sums(batch, arguments)
        if found_S is None:
            raise InvalidRequest(
                "DPOLoss needs log-probabilities of a reference: 'ref_outputs' (what forward_only "
                "with disable_lora=True gave), 'ref_logps', or 'ref_chosen_logps' and "
                "'ref_rejected_logps'. Or set reference_free=True."
            )
        reference_S = found_S
    kind, sft_weight = settings["loss_type"], float(settings["sft_weight"])

    def evaluate(lp_T: Float64Array) -> Evaluated:
        ratio_S = batch.sums_S(lp_T) - reference_S
        m_P = beta * (ratio_S[0::2] - ratio_S[1::2])
        if kind == "sigmoid":
            loss_P = -(1 - smoothing) * log_sigmoid(m_P) - smoothing * log_sigmoid(-m_P)
            slope_P = -(1 - smoothing) * sigmoid(-m_P) + smoothing * sigmoid(m_P)
        elif kind == "hinge":
            loss_P, slope_P = np.maximum(0.0, 1 - m_P), np.where(m_P < 1, -1.0, 0.0)
        elif kind == "ipo":
            error_P = m_P - 1 / (2 * beta)
            loss_P, slope_P = error_P * error_P, 2 * error_P
        else:
            chosen_P, rejected_P = sigmoid(beta * ratio_S[0::2]), sigmoid(beta * ratio_S[1::2])
            loss_P = 1 - chosen_P + rejected_P
            by_row = _interleave(-chosen_P * (1 - chosen_P), rejected_P * (1 - rejected_P))
            return _with_sft(batch, lp_T, loss_P, beta * by_row, sft_weight)
        return _with_sft(batch, lp_T, loss_P, beta * _interleave(slope_P, -slope_P), sft_weight)

    return Objective(evaluate=evaluate)


def simpo(settings: Json, batch: LabelledBatch, _arguments: Json) -> Objective:
    """``-log S(beta (c / Nc - r / Nr) - gamma)``: https://arxiv.org/abs/2405.14734, equation 6."""
    _pairs(batch, "SimPOLoss")
    beta, gamma = float(settings["beta"]), float(settings["gamma"])
    lengths_S = np.maximum(batch.counts_S, 1)

    def evaluate(lp_T: Float64Array) -> Evaluated:
        mean_S = batch.sums_S(lp_T) / lengths_S
        m_P = beta * (mean_S[0::2] - mean_S[1::2]) - gamma
        slope_P = -beta * sigmoid(-m_P)
        slope_S = _interleave(slope_P, -slope_P) / lengths_S
        return _with_sft(batch, lp_T, -log_sigmoid(m_P), slope_S, 0.0)

    return Objective(evaluate=evaluate)


def cpo(settings: Json, batch: LabelledBatch, _arguments: Json) -> Objective:
    """``-log S(beta (c - r))`` and ``bc_coef`` times the cross entropy of the chosen answers.

    Source: https://arxiv.org/abs/2401.08417, equations 4 to 6.
    """
    _pairs(batch, "CPOLoss")
    beta, bc_coef = float(settings["beta"]), float(settings["bc_coef"])

    def evaluate(lp_T: Float64Array) -> Evaluated:
        sum_S = batch.sums_S(lp_T)
        m_P = beta * (sum_S[0::2] - sum_S[1::2])
        slope_P = -beta * sigmoid(-m_P)
        slope_S = _interleave(slope_P, -slope_P)
        return _with_sft(batch, lp_T, -log_sigmoid(m_P), slope_S, bc_coef)

    return Objective(evaluate=evaluate)


def orpo(settings: Json, batch: LabelledBatch, _arguments: Json) -> Objective:
    """Cross entropy of the chosen answers, and ``-lambda log S(o(c) - o(r))``.

    ``o(x) = a - log(1 - exp(a))`` are the log odds of an answer, a the mean of its log-probability
    over its targets: https://arxiv.org/abs/2403.07691, equations 4 to 7.
    """
    _pairs(batch, "ORPOLoss")
    strength = float(settings["lambda_orpo"])
    lengths_S = np.maximum(batch.counts_S, 1)

    def evaluate(lp_T: Float64Array) -> Evaluated:
        mean_S = batch.sums_S(lp_T) / lengths_S
        # A mean of 0 has infinite odds; from the bound on the odds stand still.
        below_S = np.minimum(mean_S, _LARGEST_MEAN_LOGPROB)
        odds_S = mean_S - log_one_minus_exp(below_S)
        m_P = odds_S[0::2] - odds_S[1::2]
        # The derivative of log(1 - exp(x)) is -exp(x) / (1 - exp(x)).
        odds_ratio_S = -np.exp(below_S) / np.expm1(below_S)
        rise_S = 1.0 + np.where(mean_S < _LARGEST_MEAN_LOGPROB, odds_ratio_S, 0.0)
        slope_P = -sigmoid(-m_P)
        slope_S = strength * _interleave(slope_P, -slope_P) * rise_S / lengths_S
        return _with_sft(batch, lp_T, -strength * log_sigmoid(m_P), slope_S, 1.0)

    return Objective(evaluate=evaluate)


def reference_sums(batch: LabelledBatch, arguments: Json) -> Float64Array | None:
    """Reference log-probabilities by row (S,), from whichever argument has them; None if none.

    Raises:
        InvalidRequest: They do not fit the batch.
    """
    chosen, rejected = arguments.get("ref_chosen_logps"), arguments.get("ref_rejected_logps")
    if (chosen is None) != (rejected is None):
        raise InvalidRequest("Give both 'ref_chosen_logps' and 'ref_rejected_logps', or neither.")
    if chosen is not None:
        halves = [
            one_value_each(values, batch.num_rows // 2, what)
            for values, what in ((chosen, "ref_chosen_logps"), (rejected, "ref_rejected_logps"))
        ]
        return _interleave(*halves)
    values = arguments.get("ref_logps")
    what = "ref_logps"
    if values is None and (outputs := arguments.get("ref_outputs")) is not None:
        if not isinstance(outputs, dict):
            raise InvalidRequest("'ref_outputs' must be what a forward gave, with 'logps'.")
        values = outputs.get("logps")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        what = "ref_outputs['logps']"
    return None if values is None else batch.sums_S(batch.align(values, what))


def one_value_each(values: object, count: int, what: str) -> Float64Array:
    """Finite numbers, one for each of ``count``.

    Raises:
        InvalidRequest: Anything else.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty((), dtype=object)
    if array.dtype.kind not in "iuf" or array.size != count:
        raise InvalidRequest(f"{what!r} must be {count} numbers, one for each pair.")
    array = array.reshape(-1).astype(np.float64)
    if not np.isfinite(array).all():
        pair = int(np.argmin(np.isfinite(array)))
        raise InvalidRequest(f"{what!r} is NaN or infinite for pair {pair}.")
    return array


def _pairs(batch: LabelledBatch, name: str) -> None:
    if batch.num_rows % 2:
        raise InvalidRequest(
            f"{name} takes pairs: rows alternate between a chosen and a rejected answer, so their "
            f"number must be even, not {batch.num_rows}."
        )


def _interleave(chosen_P: Float64Array, rejected_P: Float64Array) -> Float64Array:
    return np.stack([chosen_P, rejected_P], axis=1).reshape(-1)


def _with_sft(
    batch: LabelledBatch,
    lp_T: Float64Array,
    loss_P: Float64Array,
    slope_S: Float64Array,
    weight: float,
) -> Evaluated:
    """The mean over pairs, and ``weight`` times the mean cross entropy of chosen targets.

    ``slope_S`` is the derivative of the sum over pairs by each row's every logprob.
    """
    value = float(loss_P.mean())
    slopes_T = slope_S[batch.row_T] / len(loss_P)
    if weight:
        chosen_T = batch.row_T % 2 == 0
        scale = weight / max(1, int(chosen_T.sum()))
        value -= scale * float(lp_T[chosen_T].sum())
        slopes_T = slopes_T - scale * chosen_T
    return Evaluated(value=value, slopes_T=slopes_T)
