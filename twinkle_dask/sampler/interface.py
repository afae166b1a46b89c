"""What a host asks of a sampler engine; the torch engine is one, vLLM another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.types import (
    AdapterState,
    Float32Array,
    Int32Array,
    SampleRequest,
    SampleResult,
    TenantId,
)

#: Told of every token of a request as it is drawn, on the thread that calls ``step``: the sample's
#: index, the token, its logprob, and if they were asked for the likeliest tokens there with theirs.
Watch: TypeAlias = Callable[[int, int, float, tuple[Int32Array, Float32Array] | None], None]


@dataclass(frozen=True, slots=True)
class SampleWork:
    """One request as the engine gets it.

    Attributes:
        id: Unique among the requests that the engine holds.
        adapter: Key of an adapter given to ``add_adapter``; None samples the base model.
        watch: Follows the drawing; None where only the outcome is wanted.
    """

    id: str
    tenant: TenantId
    request: SampleRequest
    adapter: str | None
    watch: Watch | None = None


@dataclass(frozen=True, slots=True)
class SampleDone:
    """How a request ended. Each submitted request has exactly one, unless it was cancelled."""

    id: str
    outcome: SampleResult | TwinkleDaskError


class Sampler(Protocol):
    """A sampler engine, driven by one thread through ``step``.

    Nothing a tenant sends makes a method raise: whatever is wrong with a request or with an
    adapter comes back as the outcome of the requests concerned.
    """

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do or to give back."""
        ...

    @property
    def tokenizer(self) -> Any | None:
        """The Hugging Face tokenizer of the model, if it has one; to be read only."""
        ...

    def add_adapter(self, key: str, state: AdapterState) -> None:
        """Take in an immutable copy of an adapter's weights under ``key``.

        The copy may be evicted as soon as no request uses it, so submit what needs it before
        adding others, or ask ``has_adapter`` again. Adding a key that is there changes nothing: a
        key names one snapshot for ever.
        """
        ...

    def has_adapter(self, key: str) -> bool:
        """Whether requests may name ``key`` now."""
        ...

    def submit(self, work: SampleWork) -> None:
        """Queue a request. It joins those already running between two steps.

        Raises:
            ValueError: A request of this id is already there.
        """
        ...

    def cancel(self, work_id: str) -> None:
        """Drop a request and free what it holds at once; it gets no outcome. Unknown ids pass."""
        ...

    def step(self) -> list[SampleDone]:
        """Do one bounded piece of work; returns the requests that ended."""
        ...
