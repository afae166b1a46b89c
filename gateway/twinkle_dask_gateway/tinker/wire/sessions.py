"""Bodies about the service and its sessions."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, Field

from twinkle_dask_gateway.tinker.wire.base import Asked, Id, Told


def _utc(when: datetime) -> datetime:
    try:
        return when.astimezone(UTC)
    except OverflowError:
        raise ValueError("out of range in UTC") from None


UtcTime = Annotated[AwareDatetime, AfterValidator(_utc)]


class CreateSession(Told):
    """``POST create_session``."""

    tags: Annotated[list[str], Field(max_length=1024)] | None = None
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class Heartbeat(Told):
    """``POST session_heartbeat``."""

    session_id: Id


class FinishReason(Told):
    """How the client's work ended."""

    type: Literal["success", "errored", "interrupted"]


class FinishSession(Told):
    """``POST sessions/{id}/finish``."""

    reason: FinishReason
    detail: str | None = None


class AssignProject(Asked):
    """``PUT sessions/{id}/project``."""

    project_id: Id


class SearchOwner(Asked):
    """Whose sessions; addresses of owners only with the type ``user``."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Annotated[list[Id], Field(min_length=1, max_length=10)] | None = None


class SessionStatusQuery(Told):
    """One of the states that a session may be in."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: (
        Annotated[list[Literal["success", "errored", "interrupted"]], Field(min_length=1)] | None
    ) = None


class SearchCursor(Told):
    """Where a page begins, as the page before said."""

    last_created_at: UtcTime
    last_session_id: Id


class SearchSessions(Asked):
    """``POST sessions/search``."""

    session_id: Id | None = None
    project_ids: Annotated[list[Id], Field(max_length=1000)] | None = None
    user_metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    display_name: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: Annotated[list[SessionStatusQuery], Field(min_length=1, max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None
