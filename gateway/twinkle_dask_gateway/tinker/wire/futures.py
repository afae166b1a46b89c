"""Bodies that ask for results."""

from typing import Annotated, Literal

from pydantic import Field

from twinkle_dask_gateway.tinker.wire.base import Id, Seq, Told

_MAX_RETRIEVED = 100_000


class TicketQuery(Told):
    """``cancel_future``."""

    request_id: Id


class RetrieveFuture(TicketQuery):
    """``retrieve_future``; of a large result its size is enough, if the client says so."""

    allow_metadata_only: bool = False


class SamplingSessionTarget(Told):
    """All requests of one client of a sampling session; 0 is the one that made it."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Field(ge=0, lt=10**10)] = 0


class RetrieveFutures(Told):
    """``retrieve_futures``.

    Attributes:
        prev_cursor: What came up to here the client knows.
        timeout: Seconds; absent leaves it to the server.
        retrieved_request_ids: Requests whose results the client has.
    """

    target: SamplingSessionTarget
    prev_cursor: Seq = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[Id] = Field(default_factory=list[Id], max_length=_MAX_RETRIEVED)
