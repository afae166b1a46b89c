"""The closed table of metrics, and what is done with their states.

A state is ``{"name": ..., "settings": ..., "values": ...}``, plain JSON with finite numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from twinkle_dask.batch_losses.settings import filled
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.metrics.base import Facts, Metric
from twinkle_dask.metrics.policies import CISPOMetric, GRPOMetric, GSPOMetric, PPOMetric
from twinkle_dask.metrics.preferences import DPOMetric, EmbeddingMetric
from twinkle_dask.metrics.progress import Accuracy, LossMetric, TrainMetric
from twinkle_dask.metrics.rollouts import CompletionRewardMetric
from twinkle_dask.types import Int64Array, Json

METRICS: Final[Mapping[str, Metric]] = {
    "LossMetric": LossMetric(),
    "Accuracy": Accuracy(),
    "TrainMetric": TrainMetric(),
    "CompletionRewardMetric": CompletionRewardMetric(),
    "DPOMetric": DPOMetric(),
    "EmbeddingMetric": EmbeddingMetric(),
    "GRPOMetric": GRPOMetric(),
    "PPOMetric": PPOMetric(),
    "GSPOMetric": GSPOMetric(),
    "CISPOMetric": CISPOMetric(),
}

#: Every argument of a call that some metric knows.
ARGUMENTS: Final = frozenset(
    {
        "old_logps", "advantages", "ref_outputs", "ref_logps", "ref_chosen_logps",
        "ref_rejected_logps", "rewards", "completion_lengths", "generate_time", "weight_sync_time",
    }
)  # fmt: skip


def new(name: str, settings: Mapping[str, Any], now: float) -> Json:
    """The state of a metric that has gathered nothing; ``now`` in seconds since 1970.

    Raises:
        InvalidRequest: Unknown metric or setting, or a value that makes no sense.
        NotSupported: A metric of Twinkle that this service does not have.
    """
    if name == "PPOValueMetric":
        raise NotSupported(
            "PPOValueMetric is not here: it measures a value head, and the models here have none."
        )
    metric = METRICS.get(name)
    if metric is None:
        known = ", ".join(sorted(METRICS))
        raise InvalidRequest(f"Unknown metric {name[:60]!r}. This service has: {known}.")
    checked = filled(f"metric {name!r}", metric.takes, settings)
    return {"name": name, "settings": checked, "values": metric.empty(now)}


def check(state: Json, labels: Sequence[Int64Array], arguments: Json) -> None:
    """Whether a batch suits a metric. Once it does, ``accumulate`` takes what the pass gives.

    Raises:
        InvalidRequest: It does not; names what is wrong.
    """
    METRICS[state["name"]].suits(state["settings"], labels, arguments)


def accumulate(state: Json, facts: Facts) -> Json:
    """The state with one more pass."""
    values = METRICS[state["name"]].add(state["values"], state["settings"], facts)
    return {**state, "values": values}


def result(state: Json, now: float) -> Json:
    """What is gathered, by Twinkle's names and in its forms; floats may be NaN or infinite."""
    return METRICS[state["name"]].tell(state["values"], state["settings"], now)


def reset(state: Json, now: float) -> Json:
    """The state after its result was told."""
    return {**state, "values": METRICS[state["name"]].again(state["values"], now)}
