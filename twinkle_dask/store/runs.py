"""Runs, and where each one's newest snapshot lies."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from twinkle_dask.store.database import Database, Page
from twinkle_dask.store.records import RunPhase, RunRecord
from twinkle_dask.store.tables import runs as t
from twinkle_dask.types import RunId, SessionId, TenantId

LIVE = (RunPhase.CREATING, RunPhase.READY)
"""States in which a run may still be asked for something, so that it must be recoverable."""


class Runs:
    """The runs of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, run: RunRecord) -> RunRecord:
        """Store a run and return what is stored: for a known (session, run_seq) the earlier one."""

        def same() -> ColumnElement[bool]:
            place = and_(t.c.session_id == run.session_id, t.c.run_seq == run.run_seq)
            return or_(t.c.id == run.id, place)

        return await self._database.insert(t, run, same)

    async def get(self, tenant: TenantId, run: RunId) -> RunRecord | None:
        """The tenant's run; None if there is none or it is another tenant's."""
        return await self._database.one(
            RunRecord, select(t).where(t.c.id == run, t.c.tenant_id == tenant)
        )

    async def live(self) -> tuple[RunRecord, ...]:
        """Every run of every tenant that is creating or ready, oldest first."""
        query = select(t).where(t.c.state.in_(LIVE)).order_by(t.c.created_at, t.c.id)
        return await self._database.all(RunRecord, query)

    async def in_session(self, session: SessionId) -> tuple[RunRecord, ...]:
        """The session's runs by ``run_seq``."""
        query = select(t).where(t.c.session_id == session).order_by(t.c.run_seq)
        return await self._database.all(RunRecord, query)

    async def page(self, tenant: TenantId, limit: int, offset: int) -> Page[RunRecord]:
        """The tenant's runs, newest first, and their total number."""
        return await self._database.page(RunRecord, t, t.c.tenant_id == tenant, limit, offset)

    async def set_state(self, run: RunId, state: RunPhase) -> None:
        """Move the run to ``state``; which moves are legal is the lifecycle's to know."""
        await self._database.change(update(t).where(t.c.id == run).values(state=state))

    async def set_snapshot(self, run: RunId, path: str, seq: int) -> str | None:
        """Record that ``path`` holds the run as it stood after operation ``seq``.

        Returns:
            The blob folder that nobody needs any more: the snapshot before, or ``path`` itself if
            it came too late (a newer one is recorded) or the run is unknown; None if there is none.
        """

        async def work(connection: AsyncConnection) -> str | None:
            this = t.c.id == run
            now = await connection.execute(select(t.c.snapshot_path, t.c.snapshot_seq).where(this))
            row = now.one_or_none()
            if row is None or row.snapshot_seq > seq:
                return path
            await connection.execute(
                update(t).where(this).values(snapshot_path=path, snapshot_seq=seq)
            )
            former: str | None = row.snapshot_path
            return former if former != path else None

        return await self._database.write(work)

    async def touch(self, runs: Iterable[RunId], when: datetime) -> None:
        """Note the latest request of many runs in one write."""
        await self._database.change_named(update(t).values(last_request_at=when), t.c.id, runs)
