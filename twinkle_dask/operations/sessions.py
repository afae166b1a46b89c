"""Clients' connections and their heartbeats."""

import secrets
import time
from dataclasses import replace

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, SessionEnded
from twinkle_dask.lifecycle import SESSION, SessionEvent, move
from twinkle_dask.operations import validation
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.values import Page, SessionInfo, Tenant
from twinkle_dask.store.records import SessionRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import Json, SessionId, TenantId

log = structlog.stdlib.get_logger(__name__)


class Sessions:
    """All sessions; the active ones in memory, since every request asks for one."""

    def __init__(self, store: Store, audit: Audit) -> None:
        self._store = store
        self._audit = audit
        self._active: dict[SessionId, SessionRecord] = {}
        self._seen_s: dict[SessionId, float] = {}
        self._touched: set[SessionId] = set()

    async def load(self) -> None:
        """Read the active sessions; their clients get the full time to be heard of again."""
        for record in await self._store.sessions.active():
            self._remember(record)

    async def create(
        self,
        tenant: Tenant,
        *,
        tags: tuple[str, ...],
        user_metadata: Json,
        display_name: str | None,
        project_id: str | None,
        sdk_version: str | None,
        idempotency_key: str | None,
    ) -> SessionId:
        """Open a session; a repeat with the same idempotency key finds the first one."""
        labels = {
            "display_name": display_name,
            "project_id": project_id,
            "sdk_version": sdk_version,
            "The idempotency key": idempotency_key,
        }
        validation.session(tags=tags, user_metadata=user_metadata, labels=labels)
        if idempotency_key is not None:
            known = await self._store.sessions.by_idempotency_key(tenant.id, idempotency_key)
            if known is not None:
                return known.id
        now = utc_now()
        record = SessionRecord(
            id=SessionId(f"session-{secrets.token_hex(8)}"),
            tenant_id=tenant.id,
            tags=tags,
            user_metadata=user_metadata,
            display_name=display_name,
            project_id=project_id,
            sdk_version=sdk_version,
            idempotency_key=idempotency_key,
            created_at=now,
            last_seen_at=now,
        )
        stored = await self._store.sessions.add(record)
        if stored.id == record.id:  # else somebody else's repeat was faster
            self._remember(record)
            log.info("session_created", session=record.id, tenant=tenant.id)
            project = {} if project_id is None else {"project_id": project_id}
            await self._audit.record(
                tenant,
                "sessions.created",
                once=f"created {record.id}",
                session_id=record.id,
                **project,
            )
        return stored.id

    async def active(self, tenant: Tenant, session: SessionId) -> SessionRecord:
        """The session, heard of now.

        Raises:
            SessionEnded: It was finished or has expired.
            NotFound: No such session of this tenant.
        """
        record = self._active.get(session)
        if record is None:
            ended = await self._store.sessions.get(tenant.id, session)
            if ended is None:
                raise NotFound(f"There is no session {session!r}.")
            raise SessionEnded(f"Session {session!r} was {ended.state}; create a new one.")
        if record.tenant_id != tenant.id:
            raise NotFound(f"There is no session {session!r}.")
        self.touch(session)
        return record

    def touch(self, session: SessionId) -> None:
        """The session's client is alive."""
        if session in self._active:
            self._seen_s[session] = time.monotonic()
            self._touched.add(session)

    def all_active(self) -> tuple[SessionId, ...]:
        """The sessions that are alive."""
        return tuple(self._active)

    def num_active(self, tenant: TenantId) -> int:
        """How many of a tenant's sessions are alive."""
        return sum(record.tenant_id == tenant for record in self._active.values())

    def is_active(self, session: SessionId) -> bool:
        """Whether work may still be done in it."""
        return session in self._active

    async def finish(
        self, tenant: Tenant, session: SessionId, *, reason: str, detail: str | None
    ) -> bool:
        """Close a session for its client. The first ending wins.

        Returns:
            Whether this call ended it.
        """
        record = self._active.get(session)
        if record is None or record.tenant_id != tenant.id:
            if await self._store.sessions.get(tenant.id, session) is None:
                raise NotFound(f"There is no session {session!r}.")
            return False
        first = await self._end(record, SessionEvent.FINISH, reason, detail)
        if first:
            await self._audit.record(tenant, "sessions.finished", session_id=session, reason=reason)
        return first

    async def assign_project(self, tenant: Tenant, session: SessionId, project: str) -> None:
        """Give a session, and with it all that was made in it, another label of the tenant's.

        Raises:
            NotFound: No such session of this tenant.
            InvalidRequest: The label is empty or too long.
        """
        if not project:
            raise InvalidRequest("project_id must not be empty; a session cannot lose its project.")
        validation.session(tags=(), user_metadata={}, labels={"project_id": project})
        record = await self._store.sessions.get(tenant.id, session)
        if record is None:
            raise NotFound(f"There is no session {session!r}.")
        await self._store.sessions.set_project(session, project)
        if session in self._active:
            self._active[session] = replace(self._active[session], project_id=project)
        await self._audit.record(
            tenant,
            "projects.session_assigned",
            session_id=session,
            project_id=project,
            former_project_id=record.project_id or "",
        )

    async def expire(self, timeout_s: float) -> None:
        """End the sessions that were not heard of for ``timeout_s``.

        One that cannot be ended is logged and does not keep the others from ending.
        """
        for record in list(self._active.values()):
            # Looked at only now: ending the ones before took time to be heard of in.
            seen_s = self._seen_s.get(record.id)
            if seen_s is None or time.monotonic() - seen_s < timeout_s:
                continue
            try:
                if await self._end(record, SessionEvent.EXPIRE, "expired", None):
                    nobody = Tenant(id=record.tenant_id, name="service", key_hint="")
                    await self._audit.record(nobody, "sessions.expired", session_id=record.id)
            except Exception:
                log.exception("session_not_expired", session=record.id)

    async def flush(self) -> None:
        """Write down who was heard of since the last call."""
        touched, self._touched = self._touched, set()
        if touched:
            await self._store.sessions.touch(touched, utc_now())

    async def info(self, tenant: Tenant, session: SessionId) -> SessionInfo:
        """A session with what was made in it."""
        record = await self._store.sessions.get(tenant.id, session)
        if record is None:
            raise NotFound(f"There is no session {session!r}.")
        runs = await self._store.runs.in_session(session)
        samplers = await self._store.samplers.in_session(session)
        return SessionInfo(
            session=session,
            runs=tuple(run.id for run in runs),
            samplers=tuple(sampler.id for sampler in samplers),
            created_at=record.created_at,
            user_metadata=record.user_metadata,
            display_name=record.display_name,
        )

    async def page(self, tenant: Tenant, limit: int, offset: int) -> Page[SessionId]:
        """A tenant's sessions, newest first."""
        records, total = await self._store.sessions.page(tenant.id, limit, offset)
        ids = tuple(record.id for record in records)
        return Page(items=ids, total=total, limit=limit, offset=offset)

    def _remember(self, record: SessionRecord) -> None:
        self._active[record.id] = record
        self._seen_s[record.id] = time.monotonic()

    async def _end(
        self, record: SessionRecord, event: SessionEvent, reason: str, detail: str | None
    ) -> bool:
        """End a session, unless somebody does so at the same time; whether it was this call."""
        state = move(SESSION, record.state, event)
        # The record first: if it cannot be written, the session goes on and is ended later.
        first = await self._store.sessions.end(
            record.id, state, reason=reason, detail=detail, when=utc_now()
        )
        self._active.pop(record.id, None)
        self._seen_s.pop(record.id, None)
        if first:
            log.info("session_ended", session=record.id, reason=reason)
        return first
