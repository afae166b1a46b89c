"""What metrics are told, and what every metric does."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from twinkle_dask.batch_losses import Float64Array, LabelledBatch
from twinkle_dask.batch_losses.settings import Setting
from twinkle_dask.types import Float32Array, Int64Array, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One pass. What a pass does not have is None or empty, and metrics leave out what needs it.

    Attributes:
        labels: Of each row, int64 (N,), -100 where there is no target; of an embedding pass int64
            (1,), 1 where a group begins.
        loss: Of the batch.
        summed: The loss is a sum over tokens (CrossEntropyLoss with reduction 'sum').
        num_counted: Of ``BatchResult``: the tokens that a sum is over.
        logprobs: Of each row, float32 (N,).
        correct: Of each row, bool (N,).
        embeddings: float32 (S, D).
        grad_norm: That the last clip found.
        learning_rates: Of each parameter group, or one; empty without an optimizer.
        gradients: Gradients that the run has seen before this pass.
        accumulation: Gradients between steps.
        arguments: Of the call, JSON by Twinkle's names: ``old_logps``, ``advantages``,
            ``ref_outputs``, ``rewards``, ...
    """

    labels: Sequence[Int64Array] = ()
    loss: float | None = None
    summed: bool = False
    num_counted: float = 0.0
    logprobs: Sequence[Float32Array] = ()
    correct: Sequence[NDArray[Any]] | None = None
    embeddings: Float32Array | None = None
    grad_norm: float | None = None
    learning_rates: Sequence[float] = ()
    gradients: int = 0
    accumulation: int = 1
    arguments: Json = field(default_factory=dict[str, Any])


class Metric(ABC):
    """A kind of metric. It holds nothing: states are given and taken."""

    takes: Mapping[str, Setting] = {}

    @abstractmethod
    def empty(self, now: float) -> Json:
        """Nothing gathered yet; ``now`` in seconds since 1970."""

    @abstractmethod
    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """What is gathered with one more pass."""

    @abstractmethod
    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """What is gathered, in Twinkle's words and forms."""

    def again(self, values: Json, now: float) -> Json:
        """What remains after telling."""
        del values
        return self.empty(now)

    def suits(self, settings: Json, labels: Sequence[Int64Array], arguments: Json) -> None:
        """Check a batch before its pass.

        Raises:
            InvalidRequest: ``add`` could not take it.
        """
        del settings, labels, arguments


def kept(value: float) -> float | str:
    """A number as JSON columns can hold it: NaN and infinity as text, which ``float`` reads."""
    return value if math.isfinite(value) else str(value)


def batch_of(settings: Json, labels: Sequence[Int64Array]) -> LabelledBatch:
    """The targets of a pass."""
    return LabelledBatch(tuple(labels), settings.get("ignore_index", -100))


def scored(batch: LabelledBatch, facts: Facts) -> Float64Array | None:
    """Logprobs of the targets (T,); None where a pass has none."""
    return batch.gather(facts.logprobs) if facts.logprobs and facts.labels else None
