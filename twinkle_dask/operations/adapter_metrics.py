"""What an adapter's metrics gather, in its progress.

Loss and logprobs are gathered when a pass is done; the gradient's norm and the learning rate are
told as they are when somebody asks, so that they belong to the step after the pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson
from numpy.typing import NDArray

from twinkle_dask import metrics, packing
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.adapter_settings import AdapterSettings, Named, Progress
from twinkle_dask.types import Float32Array, Int64Array, Json

_MAX_METRICS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What metrics are told of a pass; ``metrics.Facts`` has the meanings.

    Attributes:
        arguments: Of the call, those that some metric knows, as JSON.
    """

    labels: tuple[Int64Array, ...]
    logprobs: tuple[Float32Array, ...]
    correct: tuple[NDArray[Any], ...] | None
    embeddings: Float32Array | None
    loss: float | None
    num_counted: float
    arguments: str


packing.register(Measured)


def known_arguments(arguments: Json) -> str:
    """Those that some metric knows, as JSON."""
    return orjson.dumps(
        {name: arguments[name] for name in sorted(metrics.ARGUMENTS & arguments.keys())}
    ).decode()


def with_metric(
    metric: Named, is_training: bool | None
) -> Callable[[AdapterSettings], AdapterSettings]:
    """A change of settings: one more metric for training, evaluation, or both (None).

    Raises:
        InvalidRequest: Unknown metric or setting.
        NotSupported: A metric that this service does not have.
    """
    metrics.new(metric.name, metric.settings, time.time())

    def changed(settings: AdapterSettings) -> AdapterSettings:
        train, evaluation = settings.train_metrics, settings.eval_metrics
        if is_training is not False:
            train = (*train, metric)
        if not is_training:
            evaluation = (*evaluation, metric)
        if max(len(train), len(evaluation)) > _MAX_METRICS:
            raise InvalidRequest(f"An adapter may have {_MAX_METRICS} metrics.")
        return replace(settings, train_metrics=train, eval_metrics=evaluation)

    return changed


def check(
    settings: AdapterSettings,
    progress: Progress,
    labels: tuple[Int64Array, ...],
    arguments: Json,
    *,
    training: bool,
) -> None:
    """Whether a batch suits all metrics of its kind, before its pass.

    Raises:
        InvalidRequest: It does not; names what is wrong.
    """
    for state in _states(settings, progress, training=training):
        metrics.check(state, labels, arguments)


def accumulated(
    settings: AdapterSettings, progress: Progress, measured: Measured, *, training: bool
) -> Progress:
    """Progress with one more pass in the metrics of its kind."""
    facts = metrics.Facts(
        labels=measured.labels,
        loss=measured.loss,
        summed=settings.loss.settings.get("reduction") == "sum",
        num_counted=measured.num_counted,
        logprobs=measured.logprobs,
        correct=measured.correct,
        embeddings=measured.embeddings,
        gradients=progress.gradients,
        accumulation=settings.accumulation,
        arguments=orjson.loads(measured.arguments),
    )
    states = _states(settings, progress, training=training)
    return _with(progress, [metrics.accumulate(one, facts) for one in states], training=training)


def calculated(
    settings: AdapterSettings, progress: Progress, *, training: bool
) -> tuple[Json, Progress]:
    """What the metrics of a kind say, and progress in which they begin anew."""
    now = time.time()
    told: Json = {}
    left: list[Json] = []
    for state in _states(settings, progress, training=training):
        fresh = _refreshed(state, settings, progress)
        told.update(metrics.result(fresh, now))
        left.append(metrics.reset(fresh, now))
    return told, _with(progress, left, training=training)


def _refreshed(state: Json, settings: AdapterSettings, progress: Progress) -> Json:
    if state["name"] == "TrainMetric":
        rate = progress.learning_rate
        facts = metrics.Facts(
            learning_rates=() if rate is None else (rate,),
            gradients=max(0, progress.gradients - 1),
            accumulation=settings.accumulation,
        )
        return metrics.accumulate(state, facts)
    if state["name"] == "LossMetric" and progress.grad_norm is not None:
        return {**state, "values": {**state["values"], "grad_norm": progress.grad_norm}}
    return state


def _states(settings: AdapterSettings, progress: Progress, *, training: bool) -> list[Json]:
    named = settings.train_metrics if training else settings.eval_metrics
    known = progress.train if training else progress.eval
    now = time.time()
    # A metric that was added since has gathered nothing; none is ever taken away.
    more = [metrics.new(one.name, one.settings, now) for one in named[len(known) :]]
    return [*known, *more]


def _with(progress: Progress, states: list[Json], *, training: bool) -> Progress:
    if training:
        return replace(progress, train=tuple(states))
    return replace(progress, eval=tuple(states))
