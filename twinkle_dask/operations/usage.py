"""What tenants use: tokens and checkpoints by the hour, and what lies in storage now."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.requests import LaneRequest
from twinkle_dask.operations.tenants import Tenants
from twinkle_dask.operations.values import Exported, Result, SamplerSaved, Saved, Tenant
from twinkle_dask.store.records import SessionRecord, UsageKind, UsageRecord
from twinkle_dask.store.searches import Stored
from twinkle_dask.store.store import Store
from twinkle_dask.types import (
    Embed,
    EmbedResult,
    ForwardBackward,
    ForwardBackwardResult,
    SampleRequest,
    SampleResult,
    SessionId,
)

_LONGEST: Final = timedelta(days=14)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """Sums by the hour, with the sessions and the names of the keys that they speak of."""

    rows: tuple[UsageRecord, ...]
    sessions: Mapping[SessionId, SessionRecord]
    key_names: Mapping[int, str]


class Usage:
    """Reads what was counted."""

    def __init__(self, store: Store, tenants: Tenants) -> None:
        self._store = store
        self._tenants = tenants

    async def between(self, tenant: Tenant, start: datetime, end: datetime) -> UsageReport:
        """A tenant's usage from ``start`` up to but without ``end``.

        Args:
            tenant: Who asks.
            start: Aware, on the hour, not in the future.
            end: Aware, on the hour, at most 14 days later.

        Raises:
            InvalidRequest: The times are not so.
        """
        for name, time in (("starting_on", start), ("ending_before", end)):
            if time.tzinfo is None:
                raise InvalidRequest(f"{name} needs a time zone, for example 'Z'.")
            if time.timestamp() % 3600:
                raise InvalidRequest(f"{name} must be a full hour (UTC).")
        if start > utc_now():
            raise InvalidRequest("starting_on must not be in the future.")
        if start.timestamp() < 0:  # the first of all times is before it in UTC, where there is none
            raise InvalidRequest("starting_on must not be before 1970.")
        if not start < end <= start + _LONGEST:
            raise InvalidRequest("ending_before must be up to 14 days after starting_on.")
        rows = await self._store.usage.between(tenant.id, start, end)
        sessions = await self._store.sessions.among({row.session_id for row in rows})
        names = await self._tenants.key_names(row.key_id for row in rows)
        return UsageReport(rows=rows, sessions={one.id: one for one in sessions}, key_names=names)

    async def stored(self, tenant: Tenant, project: str | None) -> Mapping[str | None, Stored]:
        """What a tenant's checkpoints take, by project; of one project, if it is given."""
        return await self._store.searches.stored_by_project(tenant.id, project)


def input_tokens(request: LaneRequest | SampleRequest) -> int | None:
    """The tokens that a request hands in; None where it has none to count."""
    match request:
        case ForwardBackward() | Embed():
            return request.num_tokens
        case SampleRequest():
            return len(request.prompt)
        case _:
            return None


def output_tokens(result: Result) -> int | None:
    """The tokens that were drawn; None where drawing is not what was asked for."""
    if not isinstance(result, SampleResult):
        return None
    return sum(len(sequence.tokens) for sequence in result.sequences)


def used(result: Result) -> tuple[UsageKind, ...]:
    """What to count for a result."""
    match result:
        case ForwardBackwardResult() | EmbedResult():
            return (UsageKind.TRAINING,)
        case SampleResult():
            return (UsageKind.PREFILL, UsageKind.SAMPLE)
        case Saved() | Exported():
            return (UsageKind.CHECKPOINT,)
        case SamplerSaved() if result.address is not None:
            return (UsageKind.CHECKPOINT,)
        case _:
            return ()
