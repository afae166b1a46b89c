"""Data sets and loaders of tenants, for the time of their session, and the files they saved."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from twinkle_dask.lifecycle import SessionState
from twinkle_dask.store.database import Database, insert_new
from twinkle_dask.store.records import ProcessorRecord, SavedDataRecord
from twinkle_dask.store.rows import to_row
from twinkle_dask.store.tables import processors as t
from twinkle_dask.store.tables import saved_data as s
from twinkle_dask.store.tables import sessions
from twinkle_dask.types import TenantId

_ACTIVE = select(sessions.c.id).where(sessions.c.state == SessionState.ACTIVE)


class Processors:
    """The processors of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: ProcessorRecord) -> None:
        """Store a new processor."""
        await self._database.insert(t, record, lambda: t.c.id == record.id)

    async def get(self, tenant: TenantId, processor: str) -> ProcessorRecord | None:
        """The tenant's processor; None if there is none or it is another tenant's."""
        query = select(t).where(t.c.id == processor, t.c.tenant_id == tenant)
        return await self._database.one(ProcessorRecord, query)

    async def update(self, states: Mapping[str, tuple[str, int]]) -> None:
        """Replace states of processors by (state, bytes of files), all or none."""

        def work(connection: Connection) -> None:
            for processor, (state, num_bytes) in states.items():
                changed = update(t).where(t.c.id == processor)
                connection.execute(changed.values(state=state, num_bytes=num_bytes))

        await self._database.write(work)

    async def remove(self, processor: str) -> None:
        """Forget a processor."""
        await self._database.change(delete(t).where(t.c.id == processor))

    async def count(self, tenant: TenantId) -> int:
        """How many processors of sessions that are alive a tenant has."""
        mine = and_(t.c.tenant_id == tenant, t.c.session_id.in_(_ACTIVE))
        return await self._database.scalar(select(func.count()).select_from(t).where(mine))

    async def held_bytes(self, tenant: TenantId) -> int:
        """Bytes of all files of a tenant, saved ones included."""
        processed = await self._sum(t.c.num_bytes, t.c.tenant_id == tenant)
        return processed + await self._sum(s.c.num_bytes, s.c.tenant_id == tenant)

    async def ended(self) -> tuple[ProcessorRecord, ...]:
        """Processors whose session is over."""
        return await self._database.all(
            ProcessorRecord, select(t).where(t.c.session_id.not_in(_ACTIVE))
        )

    async def folders(self) -> frozenset[str]:
        """The names of the folders that processors have."""
        return frozenset(await self._database.values(select(t.c.id)))

    async def saved(self, tenant: TenantId) -> tuple[SavedDataRecord, ...]:
        """The files that a tenant has saved."""
        return await self._database.all(SavedDataRecord, select(s).where(s.c.tenant_id == tenant))

    async def save(self, record: SavedDataRecord) -> str | None:
        """Record a saved file; the path of the one that it replaces, if there was one."""
        same = and_(s.c.tenant_id == record.tenant_id, s.c.name == record.name)

        def work(connection: Connection) -> str | None:
            replaced = connection.scalar(select(s.c.path).where(same))
            connection.execute(delete(s).where(same))
            insert_new(connection, s, to_row(record))
            return replaced

        return await self._database.write(work)

    async def touch_saved(self, tenant: TenantId, names: Iterable[str], when: datetime) -> None:
        """Note that saved files are in use."""
        mine = update(s).where(s.c.tenant_id == tenant).values(used_at=when)
        await self._database.change_named(mine, s.c.name, names)

    async def remove_saved(self, before: datetime) -> tuple[str, ...]:
        """Forget saved files that were not used since; the paths they had."""

        def work(connection: Connection) -> tuple[str, ...]:
            paths = tuple(connection.scalars(select(s.c.path).where(s.c.used_at < before)))
            connection.execute(delete(s).where(s.c.used_at < before))
            return paths

        return await self._database.write(work)

    async def saved_paths(self) -> frozenset[str]:
        """The blobs of all saved files."""
        return frozenset(await self._database.values(select(s.c.path)))

    async def _sum(self, column: ColumnElement[int], which: ColumnElement[bool]) -> int:
        return await self._database.scalar(select(func.coalesce(func.sum(column), 0)).where(which))
