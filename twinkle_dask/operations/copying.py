"""Copies of checkpoints, which share their source's files.

A copy belongs to a run of its own that was never trained and cannot be. That run has a session like
every other: the one that the client names, or, for a copy into a project, one that is made for it
and is over from its beginning. So everything that asks for a run's session (whose project it is in,
what a session has made, what of it is still alive) needs no exception for copies.
"""

import secrets
import uuid
from dataclasses import replace
from datetime import timedelta

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound
from twinkle_dask.operations import validation
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.values import CheckpointAddress, Tenant
from twinkle_dask.store.copies import Copied
from twinkle_dask.store.records import (
    CheckpointRecord,
    RunPhase,
    RunRecord,
    SessionRecord,
    SessionState,
)
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, SessionId


class Copying:
    """Makes copies. No bytes are moved."""

    def __init__(
        self, store: Store, checkpoints: Checkpoints, sessions: Sessions, audit: Audit
    ) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._audit = audit

    async def into_project(
        self,
        tenant: Tenant,
        source: CheckpointAddress,
        *,
        reader: Tenant,
        project: str,
        ttl_s: int | None,
        idempotency_key: str | None,
    ) -> CheckpointAddress:
        """Copy a checkpoint into a project; a repeat with the same key finds the first copy.

        Args:
            tenant: Who will own the copy.
            source: Of any kind, which the copy keeps.
            reader: Who may read the source.
            project: Of the session that is made for the copy.
            ttl_s: The copy's own lifetime; the source's is not inherited.
            idempotency_key: Of the tenant's choosing.

        Raises:
            NotFound: ``reader`` may not read the source.
            InvalidRequest: The key was used for something else.
        """
        validation.ttl(ttl_s)
        validation.text(project, "destination_project_id", validation.MAX_LABEL_LENGTH)
        # Apart from the keys of sessions that a client creates.
        key = None if idempotency_key is None else f"copy-weights {idempotency_key}"
        validation.text(key, "The idempotency key", validation.MAX_LABEL_LENGTH)
        record = await self._checkpoints.readable(reader.id, source)
        if key is not None:
            made = await self._store.sessions.by_idempotency_key(tenant.id, key)
            if made is not None:
                return await self._repeat(tenant, record, made.id, 0)
        now = utc_now()
        session = SessionRecord(
            id=SessionId(f"session-{secrets.token_hex(8)}"),
            tenant_id=tenant.id,
            state=SessionState.FINISHED,
            display_name=f"Copy of {source.kind}/{source.name}",
            project_id=project,
            idempotency_key=key,
            created_at=now,
            last_seen_at=now,
            ended_at=now,
            end_reason="success",
        )
        return await self._copy(tenant, record, reader, session.id, 0, ttl_s, session)

    async def into_session(
        self,
        tenant: Tenant,
        source: CheckpointAddress,
        *,
        reader: Tenant,
        session: SessionId,
        seq: int,
        ttl_s: int | None,
    ) -> CheckpointAddress:
        """Copy a checkpoint into a run of a session, at ``seq`` among its runs.

        A repeat finds the first copy.

        Raises:
            NotFound: No such session of this tenant, or ``reader`` may not read the source.
            SessionEnded: The session is over.
            InvalidRequest: Another run has that place.
        """
        validation.ttl(ttl_s)
        await self._sessions.active(tenant, session)
        record = await self._checkpoints.readable(reader.id, source)
        if await self._store.runs.get(tenant.id, _run(session, seq)) is not None:
            return await self._repeat(tenant, record, session, seq)
        return await self._copy(tenant, record, reader, session, seq, ttl_s, None)

    async def _copy(
        self,
        tenant: Tenant,
        source: CheckpointRecord,
        reader: Tenant,
        session: SessionId,
        seq: int,
        ttl_s: int | None,
        new_session: SessionRecord | None,
    ) -> CheckpointAddress:
        now = utc_now()
        # Of somebody else's run only its checkpoint was shared.
        origin = await self._store.runs.get(reader.id, source.run_id)
        run = RunRecord(
            id=_run(session, seq),
            session_id=session,
            tenant_id=tenant.id,
            run_seq=seq,
            base_model=source.base_model,
            spec=source.spec,
            user_metadata={} if origin is None else origin.user_metadata,
            state=RunPhase.COPIED,
            created_at=now,
            last_request_at=now,
        )
        copy = replace(
            source,
            id=uuid.uuid4().hex,
            tenant_id=tenant.id,
            run_id=run.id,
            public=False,
            created_at=now,
            expires_at=None if ttl_s is None else now + timedelta(seconds=ttl_s),
            last_used_at=None,
        )
        address = CheckpointAddress(run=run.id, kind=copy.kind, name=copy.name or "")
        match await self._store.copies.add(copy, run, new_session, source=source.id):
            case Copied.DONE:
                pass
            case Copied.TAKEN:
                if new_session is not None and new_session.idempotency_key is not None:
                    # Of two requests with one key this was the second.
                    key = new_session.idempotency_key
                    first = await self._store.sessions.by_idempotency_key(tenant.id, key)
                    session = session if first is None else first.id
                return await self._repeat(tenant, source, session, seq)
            case Copied.SOURCE_GONE:
                raise NotFound("The checkpoint was deleted while it was to be copied.")
        await self._audit.record(
            tenant,
            "checkpoints.copied",
            path=f"{run.id}/{copy.kind}/{copy.name}",
            source=f"{source.run_id}/{source.kind}/{source.name}",
        )
        return address

    async def _repeat(
        self, tenant: Tenant, source: CheckpointRecord, session: SessionId, seq: int
    ) -> CheckpointAddress:
        """The address of the copy that is there already."""
        run = await self._store.runs.get(tenant.id, _run(session, seq))
        if run is None or run.state is not RunPhase.COPIED:
            raise InvalidRequest(f"Place {seq} of session {session!r} is taken by another run.")
        copies = await self._store.checkpoints.for_run(tenant.id, run.id)
        if not copies:
            raise NotFound("The copy that was made first was deleted or has expired.")
        if copies[0].path != source.path:
            raise InvalidRequest("The same key or place was used for a copy of something else.")
        return CheckpointAddress(run=run.id, kind=copies[0].kind, name=copies[0].name or "")


def _run(session: SessionId, seq: int) -> RunId:
    return RunId(f"{session}:train:{seq}")
