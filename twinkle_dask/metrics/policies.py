"""How far a policy has moved from the one that sampled, and how much of that is clipped."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from twinkle_dask.batch_losses import IGNORED_LABEL, Float64Array, LabelledBatch
from twinkle_dask.batch_losses.settings import Setting, number, or_none, whole
from twinkle_dask.metrics.base import Facts, Metric, batch_of, kept, scored
from twinkle_dask.types import Int64Array, Json

#: Ratios are told up to its exponential, 5e34.
_LARGEST_LOG_RATIO: Final = 80.0
_MAX_RECORDS: Final = 1024


class GRPOMetric(Metric):
    """Over tokens: mean log-probabilities, KL(sampler || policy) by k3, ratios, clipping.

    ``temperature`` scales log-probabilities, ``epsilon`` and ``epsilon_high`` are the loss's, and
    ``top_k_kl`` tells so many tokens of each pass with the largest KL (``_high_kl_records``).
    k3: http://joschu.net/blog/kl-approx.html. No entropy: it is not computed here.
    """

    takes: Mapping[str, Setting] = {
        "ignore_index": Setting(default=IGNORED_LABEL, check=whole()),
        "temperature": Setting(default=1.0, check=number(0, above=True)),
        "epsilon": Setting(default=0.2, check=number(0)),
        "epsilon_high": Setting(default=None, check=or_none(number(0))),
        "top_k_kl": Setting(default=0, check=whole(0)),
    }

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        sums = ("new", "old", "diff", "kl", "max_kl", "max_ratio", "low", "high", "judged")
        return {**dict.fromkeys(sums, 0.0), "tokens": 0, "compared": 0, "rows": 0, "records": []}

    def suits(self, settings: Json, labels: Sequence[Int64Array], arguments: Json) -> None:
        """See ``Metric``."""
        if labels:
            batch = batch_of(settings, labels)
            _aligned(batch, arguments, "old_logps")
            _aligned(batch, arguments, "advantages")

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        batch = batch_of(settings, facts.labels)
        lp_T = scored(batch, facts)
        if lp_T is None:
            return values
        more = dict(values)
        more["rows"] += batch.num_rows
        if not len(lp_T):
            return more
        lp_T = lp_T * float(settings["temperature"])
        more["tokens"] += len(lp_T)
        _add(more, new=lp_T.sum())
        old_T = _aligned(batch, facts.arguments, "old_logps")
        if old_T is None:
            return more
        old_T = old_T * float(settings["temperature"])
        d_T = lp_T - old_T
        ratio_T = np.exp(np.minimum(d_T, _LARGEST_LOG_RATIO))
        kl_T = ratio_T - d_T - 1.0
        more["compared"] += len(lp_T)
        _add(more, old=old_T.sum(), diff=d_T.sum(), kl=kl_T.sum())
        more["max_kl"] = kept(max(float(values["max_kl"]), float(kl_T.max())))
        more["max_ratio"] = kept(max(float(values["max_ratio"]), float(ratio_T.max())))
        advantages_T = _aligned(batch, facts.arguments, "advantages")
        if advantages_T is not None:
            epsilon, high = float(settings["epsilon"]), settings["epsilon_high"]
            bounds = 1 - epsilon, 1 + (epsilon if high is None else float(high))
            low, above, judged = self._clipped(batch, d_T, advantages_T, bounds)
            _add(more, low=low, high=above, judged=judged)
        if settings["top_k_kl"]:
            records = _records(
                batch, facts, kl_T, lp_T, old_T, settings["top_k_kl"], values["rows"]
            )
            more["records"] = (values["records"] + records)[-_MAX_RECORDS:]
        return more

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        if not (tokens := values["tokens"]):
            return {}
        mean = float(values["new"]) / tokens
        told: Json = {"train/policy_confidence": math.exp(mean), "train/mean_new_logp": mean}
        if compared := values["compared"]:
            told |= {
                "train/mean_old_logp": float(values["old"]) / compared,
                "train/logp_diff_mean": float(values["diff"]) / compared,
                "train/approx_kl": float(values["kl"]) / compared,
                "train/token_kl_max": float(values["max_kl"]),
                "train/token_ratio_max": float(values["max_ratio"]),
            }
        if judged := float(values["judged"]):
            low, high = float(values["low"]) / judged, float(values["high"]) / judged
            told |= {
                "train/clip_ratio_low": low,
                "train/clip_ratio_high": high,
                "train/clip_ratio": low + high,
            }
        if values["records"]:
            told["_high_kl_records"] = values["records"]
        return told

    def _clipped(
        self,
        batch: LabelledBatch,
        d_T: Float64Array,
        advantages_T: Float64Array,
        bounds: tuple[float, float],
    ) -> tuple[float, float, float]:
        """How many are clipped from below and from above, and of how many; here tokens."""
        del batch
        return _outside(d_T, bounds, advantages_T < 0, advantages_T > 0)


class PPOMetric(GRPOMetric):
    """The same as GRPOMetric."""


class GSPOMetric(GRPOMetric):
    """GRPOMetric with the clipping of rows, by their mean log ratios."""

    def _clipped(
        self,
        batch: LabelledBatch,
        d_T: Float64Array,
        advantages_T: Float64Array,
        bounds: tuple[float, float],
    ) -> tuple[float, float, float]:
        has_S = batch.counts_S > 0
        lengths_S = np.maximum(batch.counts_S, 1)
        mean_S = (batch.sums_S(d_T) / lengths_S)[has_S]
        advantage_S = (batch.sums_S(advantages_T) / lengths_S)[has_S]
        return _outside(mean_S, bounds, advantage_S < 0, advantage_S > 0)


class CISPOMetric(GRPOMetric):
    """GRPOMetric with the clipping of all tokens, whatever their advantage."""

    def _clipped(
        self,
        batch: LabelledBatch,
        d_T: Float64Array,
        advantages_T: Float64Array,
        bounds: tuple[float, float],
    ) -> tuple[float, float, float]:
        del batch
        every_T = np.ones(len(advantages_T), dtype=np.bool_)
        return _outside(d_T, bounds, every_T, every_T)


def _outside(
    d: Float64Array, bounds: tuple[float, float], may_low: Any, may_high: Any
) -> tuple[float, float, float]:
    ratio = np.exp(np.minimum(d, _LARGEST_LOG_RATIO))
    low, high = (ratio < bounds[0]) & may_low, (ratio > bounds[1]) & may_high
    return float(low.sum()), float(high.sum()), float(len(d))


def _aligned(batch: LabelledBatch, arguments: Json, name: str) -> Float64Array | None:
    given = arguments.get(name)
    return None if given is None else batch.align(given, name, broadcast=True)


def _add(values: Json, **more: float) -> None:
    for name, number_ in more.items():
        values[name] = kept(float(values[name]) + float(number_))


def _records(
    batch: LabelledBatch,
    facts: Facts,
    kl_T: Float64Array,
    lp_T: Float64Array,
    old_T: Float64Array,
    k: int,
    first_row: int,
) -> list[Json]:
    """The k tokens of a pass with the largest KL, in Twinkle's form."""
    position_T = np.concatenate([np.flatnonzero(mask) for mask in batch.masks_S])
    order = np.argsort(-kl_T, kind="stable")[: min(k, _MAX_RECORDS)]
    return [
        {
            "gsi": first_row + int(batch.row_T[t]),
            "pos": int(position_T[t]),
            "token_id": int(facts.labels[int(batch.row_T[t])][position_T[t]]),
            "kl": kept(float(kl_T[t])),
            "ratio": kept(math.exp(min(float(lp_T[t] - old_T[t]), _LARGEST_LOG_RATIO))),
            "logp_new": kept(float(lp_T[t])),
            "logp_old": kept(float(old_T[t])),
        }
        for t in order
        if kl_T[t] > 0
    ]
