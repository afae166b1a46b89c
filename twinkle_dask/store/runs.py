"""Runs, and where each one's newest snapshot lies."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, or_, select, update

from twinkle_dask.store.database import Database, Page
from twinkle_dask.store.records import OperationState, RunPhase, RunRecord, SessionState
from twinkle_dask.store.tables import operations, sessions
from twinkle_dask.store.tables import runs as t
from twinkle_dask.types import RunId, SessionId, TenantId

LIVE = (RunPhase.CREATING, RunPhase.READY)
"""States in which a run may still be asked for something, so that it must be recoverable."""

_ENDING = (*LIVE, RunPhase.FAILED)
"""States that end with the session."""


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

    async def to_close(self) -> tuple[RunRecord, ...]:
        """Every run that was unloaded, or whose session is over, and whose work is all done."""
        pending = exists().where(
            operations.c.run_id == t.c.id, operations.c.state == OperationState.PENDING
        )
        query = (
            select(t)
            .join(sessions, sessions.c.id == t.c.session_id)
            .where(
                or_(
                    t.c.state == RunPhase.UNLOADED,
                    and_(t.c.state.in_(_ENDING), sessions.c.state != SessionState.ACTIVE),
                ),
                ~pending,
            )
        )
        return await self._database.all(RunRecord, query)

    async def close(self, run: RunId) -> None:
        """Nothing will be asked of the run any more, so nobody needs its snapshot."""
        closed = update(t).where(t.c.id == run)
        await self._database.change(closed.values(state=RunPhase.CLOSED, snapshot_path=None))

    async def snapshot_folders(self) -> frozenset[str]:
        """The blob folders of all snapshots that are of use."""
        folders = select(t.c.snapshot_path).where(t.c.snapshot_path.is_not(None))
        return frozenset(await self._database.values(folders))

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
            it came too late (a newer one is recorded, the run is closed or unknown); None if there
            is none.
        """

        def work(connection: Connection) -> str | None:
            this = t.c.id == run
            columns = (t.c.state, t.c.snapshot_path, t.c.snapshot_seq)
            row = connection.execute(select(*columns).where(this)).one_or_none()
            if row is None or row.state is RunPhase.CLOSED or row.snapshot_seq > seq:
                return path
            connection.execute(update(t).where(this).values(snapshot_path=path, snapshot_seq=seq))
            former: str | None = row.snapshot_path
            return former if former != path else None

        return await self._database.write(work)

    async def remove_failed(self, run: RunId) -> None:
        """Remove a run that could not be made, with the operation that was to make it."""
        gone = and_(t.c.id == run, t.c.state == RunPhase.FAILED)

        def work(connection: Connection) -> None:
            if connection.scalar(select(t.c.id).where(gone)) is not None:
                connection.execute(delete(operations).where(operations.c.run_id == run))
                connection.execute(delete(t).where(gone))

        await self._database.write(work)

    async def touch(self, runs: Iterable[RunId], when: datetime) -> None:
        """Note the latest request of many runs in one write."""
        await self._database.change_named(update(t).values(last_request_at=when), t.c.id, runs)
