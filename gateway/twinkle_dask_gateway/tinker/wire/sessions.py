"""Bodies about the service and its sessions."""

from typing import Any, Literal

from twinkle_dask_gateway.tinker.wire.base import Id, Told


class CreateSession(Told):
    """``POST create_session``."""

    tags: list[str] | None = None
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
