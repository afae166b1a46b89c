"""What a client says of its rollouts, and what it knows itself."""

import math
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np

from twinkle_dask.batch_losses import Float64Array
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.metrics.base import Facts, Metric, kept
from twinkle_dask.types import Int64Array, Json

_MAX_REWARDS: Final = 256
_MAX_NAME_LENGTH: Final = 128
_TIMES: Final = {
    "weight_sync_time": "profiling/Time taken: move_model_to_sampler",
    "generate_time": "profiling/Time taken: generate",
}


class CompletionRewardMetric(Metric):
    """Means of what the client says of its rollouts: rewards by name, lengths, seconds.

    Of each series its number, mean and sum of squared deviations are kept, joined as by Chan et al.
    1979 (http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf).
    """

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        return {"rewards": {}, "others": {}}

    def suits(self, settings: Json, labels: Sequence[Int64Array], arguments: Json) -> None:
        """See ``Metric``."""
        del settings, labels
        _given(arguments)

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        del settings
        rewards, others = _given(facts.arguments)
        return {
            "rewards": _joined(values["rewards"], rewards),
            "others": _joined(values["others"], others),
        }

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        told: Json = {}
        others = values["others"]
        for name, words in _TIMES.items():
            if name in others:
                told[words] = float(others[name][1])
        for name, (number, mean, squares) in values["rewards"].items():
            told[f"train/{name}_reward"] = float(mean)
            spread = math.sqrt(float(squares) / (number - 1)) if number > 1 else 0.0
            told[f"train/{name}_reward_std"] = spread
        if "completion_lengths" in others:
            told["train/completion_length"] = float(others["completion_lengths"][1])
        return told


def _given(arguments: Json) -> tuple[dict[str, Float64Array], dict[str, Float64Array]]:
    """Rewards by name, and the other series that the call has."""
    given: Any = arguments.get("rewards")
    if given is not None and not isinstance(given, dict):
        raise InvalidRequest("'rewards' must be a mapping of names to lists of numbers.")
    rewards = cast(dict[Any, Any], given or {})
    if len(rewards) > _MAX_REWARDS:
        raise InvalidRequest(f"'rewards' may have {_MAX_REWARDS} names.")
    series: dict[str, Float64Array] = {}
    for name, numbers in rewards.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH:
            raise InvalidRequest(
                f"A name in 'rewards' must be text of at most {_MAX_NAME_LENGTH} characters."
            )
        series[name] = _numbers(numbers, f"rewards[{name!r}]")
    names = ("completion_lengths", "generate_time", "weight_sync_time")
    others = {
        name: _numbers(arguments[name], name) for name in names if arguments.get(name) is not None
    }
    return series, others


def _numbers(values: object, what: str) -> Float64Array:
    try:
        array = np.atleast_1d(np.asarray(values))
    except ValueError:
        array = np.empty((), dtype=object)
    if array.size and array.dtype.kind not in "iuf":
        raise InvalidRequest(f"{what!r} must be numbers.")
    numbers = array.reshape(-1).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise InvalidRequest(f"{what!r} has NaN or infinity.")
    return numbers


def _joined(known: Json, more: dict[str, Float64Array]) -> Json:
    joined = dict(known)
    for name, values in more.items():
        if not len(values):
            continue
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        number, old_mean, old_squares = joined.get(name, (0, 0.0, 0.0))
        total = number + len(values)
        step = mean - float(old_mean)
        joined[name] = [
            total,
            kept(float(old_mean) + step * len(values) / total),
            kept(float(old_squares) + squares + step * step * number * len(values) / total),
        ]
    return joined
