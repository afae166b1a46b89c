"""What was sampled in a session, kept so that training data can be compared with it."""

from collections.abc import Iterable

from sqlalchemy import Connection, delete, select

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import RecordedRecord, SessionState
from twinkle_dask.store.tables import recorded_samples as t
from twinkle_dask.store.tables import sessions
from twinkle_dask.types import SessionId, TenantId, TicketId

_AT_ONCE = 5_000


class RecordedSamples:
    """The recorded samples of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, sample: RecordedRecord) -> RecordedRecord:
        """Store a sample and return what is stored: for a known ticket the earlier one."""
        return await self._database.insert(t, sample, lambda: t.c.ticket_id == sample.ticket_id)

    async def of(
        self, tenant: TenantId, session: SessionId, tickets: Iterable[TicketId]
    ) -> tuple[RecordedRecord, ...]:
        """Those of these tickets that were recorded in the tenant's session."""
        wanted = tuple(tickets)
        found: list[RecordedRecord] = []
        for start in range(0, len(wanted), _AT_ONCE):
            query = select(t).where(
                t.c.ticket_id.in_(wanted[start : start + _AT_ONCE]),
                t.c.tenant_id == tenant,
                t.c.session_id == session,
            )
            found += await self._database.all(RecordedRecord, query)
        return tuple(found)

    async def remove_ended(self) -> tuple[str, ...]:
        """Forget what was recorded in sessions that are over.

        Returns:
            The paths of its blobs, to be removed.
        """
        ended = select(sessions.c.id).where(sessions.c.state != SessionState.ACTIVE)
        over = t.c.session_id.in_(ended)

        def work(connection: Connection) -> tuple[str, ...]:
            paths = connection.scalars(select(t.c.content_path).where(over)).all()
            connection.execute(delete(t).where(over))
            return tuple(path for path in paths if path is not None)

        return await self._database.write(work)

    async def blob_paths(self) -> frozenset[str]:
        """Every blob that a recorded sample names."""
        paths = select(t.c.content_path).where(t.c.content_path.is_not(None))
        return frozenset(await self._database.values(paths))
