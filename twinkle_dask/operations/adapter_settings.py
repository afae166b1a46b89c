"""What an adapter is set to between calls, and how far it has got: both as JSON in its row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

from twinkle_dask.batch_losses import BatchLossSpec, loss_spec
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json, OptimizerSpec, SchedulerSpec

MAX_ACCUMULATION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A class by its name, with what a tenant has set of it."""

    name: str
    settings: Json = field(default_factory=dict[str, Any])


DEFAULT_LOSS = Named(name="CrossEntropyLoss", settings={"reduction": "sum"})
DEFAULT_METRICS = (Named(name="LossMetric"), Named(name="Accuracy"), Named(name="TrainMetric"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What a client has set of its adapter.

    Attributes:
        adapter: Its name in its session.
        accumulation: Backward passes between two boundaries.
        save_dir: Where checkpoints go besides; None for nowhere. Checked by ``SaveRoots``.
        template: What encodes trajectories; None if none was set.
        processor: How inputs are put together; None for the default, which does the same.
        train_metrics: Of forward and forward_backward.
        eval_metrics: Of forward_only.
    """

    adapter: str
    accumulation: int = 1
    save_dir: str | None = None
    template: Named | None = None
    processor: Named | None = None
    loss: Named = DEFAULT_LOSS
    optimizer: Named | None = None
    schedule: Named | None = None
    train_metrics: tuple[Named, ...] = DEFAULT_METRICS
    eval_metrics: tuple[Named, ...] = DEFAULT_METRICS

    @property
    def loss_spec(self) -> BatchLossSpec:
        """The loss, as passes take it."""
        return loss_spec(self.loss.name, self.loss.settings)

    @property
    def optimizer_spec(self) -> OptimizerSpec | None:
        """The optimizer, as steps take it; None if none was set."""
        named = self.optimizer
        return None if named is None else OptimizerSpec(name=named.name, settings=named.settings)

    @property
    def schedule_spec(self) -> SchedulerSpec | None:
        """The schedule, as steps take it; None if none was set."""
        named = self.schedule
        return None if named is None else SchedulerSpec(name=named.name, settings=named.settings)

    def wants_correct(self, *, training: bool) -> bool:
        """Whether a metric asks of each token if it was the likeliest."""
        metrics = self.train_metrics if training else self.eval_metrics
        return any(metric.name == "Accuracy" for metric in metrics)

    def json(self) -> Json:
        """For the row."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an adapter has got.

    Attributes:
        gradients: Backward passes in all.
        steps: Optimizer steps in all.
        schedule_steps: How often the schedule has moved on.
        learning_rate: That the next step will use; None if no step part has told it.
        grad_norm: That the last clip has found.
        train: What the training metrics have gathered, in their order; so ``eval``.
        weights: Names and number of the adapter's weights, once somebody has asked.
    """

    gradients: int = 0
    steps: int = 0
    schedule_steps: int = 0
    learning_rate: float | None = None
    grad_norm: float | None = None
    train: tuple[Json, ...] = ()
    eval: tuple[Json, ...] = ()
    weights: Json | None = None

    def json(self) -> Json:
        """For the row: what is no number becomes null there, which JSON columns can hold."""
        return finite(asdict(self))


def settings_of(row: Mapping[str, Any]) -> AdapterSettings:
    """Read what ``AdapterSettings.json`` wrote."""
    values = dict(row)
    for name in ("template", "processor", "loss", "optimizer", "schedule"):
        values[name] = None if values[name] is None else Named(**values[name])
    for name in ("train_metrics", "eval_metrics"):
        values[name] = tuple(Named(**one) for one in values[name])
    return AdapterSettings(**values)


def progress_of(row: Mapping[str, Any]) -> Progress:
    """Read what ``Progress.json`` wrote."""
    values = dict(row)
    for name in ("train", "eval"):
        values[name] = tuple(values.get(name, ()))
    return Progress(**values)


def accumulation_of(value: object) -> int:
    """``gradient_accumulation_steps``, checked."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ACCUMULATION:
        raise InvalidRequest(
            f"gradient_accumulation_steps must be a whole number from 1 to {MAX_ACCUMULATION}, "
            f"not {str(value)[:60]}."
        )
    return value


_T = TypeVar("_T")


def finite(value: _T) -> _T:
    """The same JSON with null in place of NaN and infinities."""
    return cast(_T, _finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in cast(Mapping[str, Any], value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in cast(Sequence[Any], value)]
    return value
