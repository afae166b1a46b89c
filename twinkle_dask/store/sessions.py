"""Sessions: who is connected, and who was."""

from collections.abc import Collection, Iterable
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update

from twinkle_dask.store.database import Database, Page, portions
from twinkle_dask.store.records import SessionRecord, SessionState
from twinkle_dask.store.tables import sessions as t
from twinkle_dask.types import SessionId, TenantId


class Sessions:
    """The sessions of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, session: SessionRecord) -> SessionRecord:
        """Store a session and return what is stored.

        Where the tenant used the idempotency key before, that is the earlier session.
        """

        def same() -> ColumnElement[bool]:
            if session.idempotency_key is None:
                return t.c.id == session.id
            key = t.c.idempotency_key == session.idempotency_key
            return or_(t.c.id == session.id, and_(t.c.tenant_id == session.tenant_id, key))

        return await self._database.insert(t, session, same)

    async def get(self, tenant: TenantId, session: SessionId) -> SessionRecord | None:
        """The tenant's session; None if there is none or it is another tenant's."""
        mine = and_(t.c.id == session, t.c.tenant_id == tenant)
        return await self._database.one(SessionRecord, select(t).where(mine))

    async def find(self, session: SessionId) -> SessionRecord | None:
        """A session, whose ever it is."""
        return await self._database.one(SessionRecord, select(t).where(t.c.id == session))

    async def among(self, sessions: Collection[SessionId]) -> tuple[SessionRecord, ...]:
        """Those of these sessions that there are, in no order."""
        found: list[SessionRecord] = []
        for some in portions(tuple(sessions)):
            query = select(t).where(t.c.id.in_(some))
            found += await self._database.all(SessionRecord, query)
        return tuple(found)

    async def set_project(self, session: SessionId, project: str) -> None:
        """Give a session another label."""
        labelled = update(t).where(t.c.id == session).values(project_id=project)
        await self._database.change(labelled)

    async def by_idempotency_key(self, tenant: TenantId, key: str) -> SessionRecord | None:
        """The session that the tenant created under ``key``."""
        mine = and_(t.c.tenant_id == tenant, t.c.idempotency_key == key)
        return await self._database.one(SessionRecord, select(t).where(mine))

    async def active(self) -> tuple[SessionRecord, ...]:
        """Every active session of every tenant, oldest first."""
        active = t.c.state == SessionState.ACTIVE
        return await self._database.all(
            SessionRecord, select(t).where(active).order_by(t.c.created_at, t.c.id)
        )

    async def page(self, tenant: TenantId, limit: int, offset: int) -> Page[SessionRecord]:
        """The tenant's sessions, newest first, and their total number."""
        return await self._database.page(SessionRecord, t, t.c.tenant_id == tenant, limit, offset)

    async def touch(self, sessions: Iterable[SessionId], when: datetime) -> None:
        """Note the heartbeats of many sessions in one write; ended ones stay as they are."""
        statement = update(t).where(t.c.state == SessionState.ACTIVE).values(last_seen_at=when)
        await self._database.change_named(statement, t.c.id, sessions)

    async def end(
        self,
        session: SessionId,
        state: SessionState,
        *,
        reason: str,
        detail: str | None,
        when: datetime,
    ) -> bool:
        """End an active session; False if it was not active any more (or is unknown)."""
        active = and_(t.c.id == session, t.c.state == SessionState.ACTIVE)
        statement = (
            update(t)
            .where(active)
            .values(state=state, end_reason=reason, end_detail=detail, ended_at=when)
        )
        return await self._database.change(statement) == 1
