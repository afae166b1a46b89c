"""Searches for sessions, and what they find, in Tinker's words."""

from dataclasses import replace

from twinkle_dask.lifecycle import SessionState
from twinkle_dask.operations.searching import FoundSession, FoundSessions, nothing, words_of
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import SessionRecord
from twinkle_dask.store.searches import SessionPlace, SessionQuery, StateQuery
from twinkle_dask.types import SessionId
from twinkle_dask_gateway.tinker import codec, replies, wire
from twinkle_dask_gateway.tokens import user_urn


def query_of(body: wire.SearchSessions, tenant: Tenant) -> SessionQuery:
    """What a client looks for. Of other owners nobody finds anything."""
    if body.owner.type == "user" and user_urn(tenant.id) not in (body.owner.owner_urns or ()):
        return nothing()
    query = SessionQuery(
        session=None if body.session_id is None else SessionId(body.session_id),
        name_words=words_of(body.display_name),
        projects=None if body.project_ids is None else tuple(body.project_ids),
        metadata=body.user_metadata or {},
    )
    if body.statuses is not None:
        found = (_state(status) for status in body.statuses)
        query = replace(query, states=tuple(state for state in found if state is not None))
    if body.cursor is not None:
        place = SessionPlace(body.cursor.last_created_at, SessionId(body.cursor.last_session_id))
        query = replace(query, after=place)
    return query


def found_sessions(found: FoundSessions) -> replies.FoundSessions:
    """A page of results."""
    following = None
    if found.next is not None:
        following = replies.SessionCursor(
            last_created_at=found.next.created_at, last_session_id=found.next.session
        )
    return replies.FoundSessions(
        sessions=[_summary(one) for one in found.items], next_cursor=following
    )


def _state(status: wire.SessionStatusQuery) -> StateQuery | None:
    match status.type:
        case "active":
            return StateQuery(state=SessionState.ACTIVE)
        case "client_finished":
            reasons = None if status.reasons is None else tuple(status.reasons)
            return StateQuery(state=SessionState.FINISHED, reasons=reasons)
        case "cancelled" | "failed":
            return None  # no session of this server ends so


def _summary(found: FoundSession) -> replies.SessionSummary:
    record = found.record
    return replies.SessionSummary(
        session_id=record.id,
        created_at=record.created_at,
        owner=user_urn(record.tenant_id),
        project_id=record.project_id or "",
        status=_status(record),
        checkpoints_count=found.stored.num_checkpoints,
        display_name=record.display_name,
        user_metadata=codec.texts(record.user_metadata),
        checkpoint_storage_bytes=found.stored.num_bytes,
    )


def _status(record: SessionRecord) -> replies.SessionStatus | None:
    """How a session is; nothing for one whose client was not heard of any more."""
    match record.state:
        case SessionState.ACTIVE:
            return replies.SessionStatus(type="active")
        case SessionState.FINISHED:
            return replies.SessionStatus(
                type="client_finished",
                reason=replies.SessionEnd(type=record.end_reason or "success"),
                detail=record.end_detail,
            )
        case SessionState.EXPIRED:
            return None
