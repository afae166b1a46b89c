"""What runs are set to between calls, and how far they have got, for clients that do not say."""

from collections.abc import Sequence

from sqlalchemy import Connection, and_, delete, select, update

from twinkle_dask.store.database import Database, portions
from twinkle_dask.store.records import RunSettingsRecord
from twinkle_dask.store.tables import run_settings as t
from twinkle_dask.types import Json, RunId, TenantId


class RunSettings:
    """A row per run whose client has its settings kept here."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: RunSettingsRecord) -> RunSettingsRecord:
        """Store the first settings of a run and return what is stored: of a known run, its own."""
        return await self._database.insert(t, record, lambda: t.c.run_id == record.run_id)

    async def get(self, tenant: TenantId, run: RunId) -> RunSettingsRecord | None:
        """The tenant's run's; None if there are none or it is another tenant's."""
        query = select(t).where(and_(t.c.run_id == run, t.c.tenant_id == tenant))
        return await self._database.one(RunSettingsRecord, query)

    async def among(self, tenant: TenantId, runs: Sequence[RunId]) -> tuple[RunSettingsRecord, ...]:
        """Those of the tenant's among these runs that have settings here, in no order."""
        found: list[RunSettingsRecord] = []
        for some in portions(tuple(runs)):
            query = select(t).where(and_(t.c.run_id.in_(some), t.c.tenant_id == tenant))
            found += await self._database.all(RunSettingsRecord, query)
        return tuple(found)

    async def set_settings(self, run: RunId, settings: Json) -> None:
        """Replace what the client has set, as a whole."""
        await self._database.change(update(t).where(t.c.run_id == run).values(settings=settings))

    async def set_progress(self, run: RunId, progress: Json) -> None:
        """Replace counters and accumulators, as a whole."""
        await self._database.change(update(t).where(t.c.run_id == run).values(progress=progress))

    async def set_pending(self, run: RunId, path: str | None, progress: Json) -> None:
        """Record where the batch lies that waits for its backward pass, with new progress."""
        changed = update(t).where(t.c.run_id == run)
        await self._database.change(changed.values(pending_path=path, progress=progress))

    async def pending_paths(self) -> frozenset[str]:
        """The blobs that rows name."""
        paths = select(t.c.pending_path).where(t.c.pending_path.is_not(None))
        return frozenset(await self._database.values(paths))

    async def remove(self, run: RunId) -> str | None:
        """Forget what a run was set to; gives the blob that its row named, if any."""

        def work(connection: Connection) -> str | None:
            path = connection.scalar(select(t.c.pending_path).where(t.c.run_id == run))
            connection.execute(delete(t).where(t.c.run_id == run))
            return path

        return await self._database.write(work)
