"""Answers about adapters."""

from typing import Any

from twinkle_dask_gateway.twinkle.replies.base import Answer, Fine


class AdapterAdded(Fine):
    """An adapter is ready; ``adapter_name`` is the id of its training run."""

    adapter_name: str


class PassDone(Answer):
    """What a pass gave; see ``ModelOutput`` of the protocol."""

    result: Any


class LossCalculated(Answer):
    """A loss, which is finite."""

    result: float


class Clipped(Answer):
    """The gradient's norm before clipping, or ``None`` between boundaries, as texts."""

    result: str


class TrainConfigs(Answer):
    """What an adapter is and is set to, in lines."""

    result: str


class StateDict(Answer):
    """An adapter's weights by PEFT's names, as nested lists."""

    result: dict[str, Any]


class Metrics(Answer):
    """What metrics say, by name."""

    result: dict[str, Any]
