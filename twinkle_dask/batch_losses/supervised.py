"""Losses of labels alone: cross entropy, and squared errors of logits."""

from typing import Any

import numpy as np

from twinkle_dask.batch_losses.batch import (
    Direct,
    Evaluated,
    Float64Array,
    LabelledBatch,
    Objective,
)
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json, LossName, LossSpec


def cross_entropy(settings: Json, batch: LabelledBatch, _arguments: Json) -> Objective:
    """``-lp`` by token, summed or averaged over the targets of the whole batch.

    With ``dft``, ``-p lp``, p = exp(lp) part of what is differentiated: the slope is
    ``-p (1 + lp)``. So Twinkle has it (after https://arxiv.org/abs/2508.05629, which stops the
    gradient at p).

    A sum counts its targets, so that a step which divides by them has a mean over all batches.
    """
    num_targets = max(1.0, float(batch.num_targets))
    is_sum = settings["reduction"] == "sum"
    scale, num_counted = (1.0, num_targets) if is_sum else (1.0 / num_targets, 1.0)
    if settings["dft"]:

        def weighed(lp_T: Float64Array) -> Evaluated:
            p_T = np.exp(lp_T)
            value = float(-(p_T * lp_T).sum() * scale)
            return Evaluated(value=value, slopes_T=-scale * p_T * (1.0 + lp_T))

        return Objective(evaluate=weighed, num_counted=num_counted)

    weights_T = np.full(batch.num_targets, scale)

    def plain(lp_T: Float64Array) -> Evaluated:
        return Evaluated(value=float(-lp_T.sum() * scale), slopes_T=-weights_T)

    direct = Direct(loss=LossSpec(name=LossName.CROSS_ENTROPY), inputs={"weights": weights_T})
    return Objective(evaluate=plain, num_counted=num_counted, direct=direct)


def squared_error(_settings: Json, batch: LabelledBatch, arguments: Json) -> Objective:
    """``(z - y)^2`` by token, averaged: z the logit of the label, y the argument ``targets``.

    Twinkle's class compares all logits with the labels, shapes that do not go together for a
    language model; with a number to be met by one logit a row can be regressed on a score.
    """
    given: Any = arguments.get("targets")
    if given is None:
        raise InvalidRequest(
            "MSELoss needs 'targets': for each row the numbers that the logits of its labels "
            "should be, one value for the row or one for each label that is not ignored."
        )
    targets_T = batch.align(given, "targets", broadcast=True)
    scale = 1.0 / max(1.0, float(batch.num_targets))

    def evaluate(logit_T: Float64Array) -> Evaluated:
        error_T = logit_T - targets_T
        value = float((error_T * error_T).sum() * scale)
        return Evaluated(value=value, slopes_T=2.0 * scale * error_T)

    return Objective(evaluate=evaluate, raw_scores=True)
