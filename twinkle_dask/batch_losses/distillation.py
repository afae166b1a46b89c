"""Distillation from what a teacher says about tokens that the client names."""

from typing import Any, Final

import numpy as np

from twinkle_dask.batch_losses.batch import Evaluated, Float64Array, LabelledBatch, Objective
from twinkle_dask.batch_losses.numbers import log_softmax
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Int64Array, Json

MAX_CELLS: Final = 2**24
"""Teacher values that a batch may score: positions of all rows, by K."""


def gkd(settings: Json, batch: LabelledBatch, arguments: Json, vocab_size: int) -> Objective:
    """Generalised Jensen-Shannon divergence of student S and teacher T, averaged over targets.

    Both are softmaxes over the same K tokens, of scores divided by ``temperature``. With
    ``M = beta T + (1 - beta) S`` it is ``beta KL(T || M) + (1 - beta) KL(S || M)``; ``KL(T || S)``
    where beta is 0 and ``KL(S || T)`` where it is 1. Source: https://arxiv.org/abs/2306.13649,
    equation 2.

    The K tokens are those of ``teacher_topk_indices`` with scores ``teacher_topk_logprobs``, or the
    ``topk`` largest of ``teacher_logits``, or all of these. ``chunk_size`` bounds Twinkle's memory;
    here logits are made in chunks anyway.
    """
    teacher_TK, tokens_TK = _teacher(batch, arguments, vocab_size)
    cells = sum(len(row) for row in batch.labels_S) * teacher_TK.shape[1]
    if cells > MAX_CELLS:
        raise InvalidRequest(
            f"The teacher says {teacher_TK.shape[1]} values at each position, {cells} over the "
            f"batch; send at most {MAX_CELLS}: the likeliest tokens only ('topk' with "
            "'teacher_logits', or 'teacher_topk_logprobs' and 'teacher_topk_indices'), or fewer "
            "rows."
        )
    beta, temperature = float(settings["beta"]), float(settings["temperature"])
    log_t_TK = log_softmax(teacher_TK / temperature) if len(teacher_TK) else teacher_TK
    scale = 1.0 / max(1, batch.num_targets)

    def evaluate(logits_TK: Float64Array) -> Evaluated:
        if not len(logits_TK):
            return Evaluated(value=0.0, slopes_T=np.zeros_like(logits_TK))
        log_s_TK = log_softmax(logits_TK / temperature)
        loss_TK, slope_TK = _divergence(log_s_TK, log_t_TK, beta)
        # Through the softmax.
        s_TK = np.exp(log_s_TK)
        slope_TK = slope_TK - s_TK * slope_TK.sum(axis=1, keepdims=True)
        return Evaluated(
            value=scale * float(loss_TK.sum()), slopes_T=slope_TK * (scale / temperature)
        )

    return Objective(evaluate=evaluate, raw_scores=True, targets_TK=tokens_TK)


def _divergence(
    log_s_TK: Float64Array, log_t_TK: Float64Array, beta: float
) -> tuple[Float64Array, Float64Array]:
    """By token and candidate: the terms of the divergence, and their derivative by ``log_s``."""
    s_TK, t_TK = np.exp(log_s_TK), np.exp(log_t_TK)
    if beta == 0:
        return t_TK * (log_t_TK - log_s_TK), -t_TK
    if beta == 1:
        difference_TK = log_s_TK - log_t_TK
        return s_TK * difference_TK, s_TK * (difference_TK + 1)
    log_m_TK = np.logaddexp(log_s_TK + np.log1p(-beta), log_t_TK + np.log(beta))
    from_m_TK = log_s_TK - log_m_TK
    terms_TK = beta * t_TK * (log_t_TK - log_m_TK) + (1 - beta) * s_TK * from_m_TK
    # The derivatives by way of log_m cancel but for one s: they sum to -(1 - beta) s.
    return terms_TK, (1 - beta) * s_TK * from_m_TK


def _teacher(
    batch: LabelledBatch, arguments: Json, vocab_size: int
) -> tuple[Float64Array, Int64Array]:
    """Scores and tokens (T, K)."""
    logprobs, indices = (
        arguments.get("teacher_topk_logprobs"),
        arguments.get("teacher_topk_indices"),
    )
    if logprobs is not None and indices is not None:
        scores_TK = batch.align_many(logprobs, "teacher_topk_logprobs")
        tokens_TK = batch.align_many(indices, "teacher_topk_indices")
        if scores_TK.shape != tokens_TK.shape:
            raise InvalidRequest(
                "'teacher_topk_logprobs' and 'teacher_topk_indices' must have the same shape."
            )
        batch.refuse_non_finite(scores_TK, "teacher_topk_logprobs")
        wrong_TK = ~((tokens_TK >= 0) & (tokens_TK < vocab_size) & (tokens_TK % 1 == 0))
        if wrong_TK.any():
            raise InvalidRequest(
                f"Row {batch.row_T[int(wrong_TK.any(axis=1).argmax())]}: teacher_topk_indices must "
                f"be tokens, from 0 to {vocab_size - 1}."
            )
        return scores_TK, tokens_TK.astype(np.int64)
    logits: Any = arguments.get("teacher_logits")
    if logits is None:
        raise InvalidRequest(
            "GKDLoss needs a teacher: 'teacher_topk_logprobs' and 'teacher_topk_indices', or "
            "'teacher_logits'."
        )
    scores_TK = batch.align_many(logits, "teacher_logits")
    if len(scores_TK) and scores_TK.shape[1] != vocab_size:
        raise InvalidRequest(
            f"'teacher_logits' has {scores_TK.shape[1]} values at a position, but the vocabulary "
            f"has {vocab_size} tokens; teacher and student must share it. Of another vocabulary "
            "send the tokens that both have, as 'teacher_topk_logprobs' and "
            "'teacher_topk_indices'."
        )
    batch.refuse_non_finite(scores_TK, "teacher_logits")
    k = _top_k(arguments.get("topk"), scores_TK.shape[1])
    if k == scores_TK.shape[1]:
        return scores_TK, np.tile(np.arange(k, dtype=np.int64), (len(scores_TK), 1))
    tokens_TK = np.argpartition(-scores_TK, k - 1, axis=1)[:, :k]
    return np.take_along_axis(scores_TK, tokens_TK, axis=1), tokens_TK.astype(np.int64)


def _top_k(given: Any, width: int) -> int:
    if given is None:
        return width
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InvalidRequest("'topk' must be a whole number of at least 1.")
    return min(given, width)
