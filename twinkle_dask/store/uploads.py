"""Uploads of checkpoints, so that who asks after a restart is told how they stand."""

from datetime import datetime

from sqlalchemy import and_, delete, select, update

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import UploadRecord, UploadState
from twinkle_dask.store.tables import uploads as t
from twinkle_dask.types import TenantId


class Uploads:
    """The uploads of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: UploadRecord) -> None:
        """Store a new upload."""
        await self._database.insert(t, record, lambda: t.c.id == record.id)

    async def get(self, tenant: TenantId, upload: str) -> UploadRecord | None:
        """The tenant's upload; None if there is none or it is another tenant's."""
        query = select(t).where(t.c.id == upload, t.c.tenant_id == tenant)
        return await self._database.one(UploadRecord, query)

    async def running(self) -> tuple[UploadRecord, ...]:
        """Uploads that have not ended, oldest first."""
        query = select(t).where(t.c.state == UploadState.RUNNING).order_by(t.c.created_at, t.c.id)
        return await self._database.all(UploadRecord, query)

    async def end(self, upload: str, state: UploadState, error: str | None = None) -> None:
        """Write down how an upload ended."""
        changed = update(t).where(t.c.id == upload).values(state=state, error=error)
        await self._database.change(changed)

    async def prune(self, before: datetime) -> None:
        """Forget uploads that have ended and were begun before a time."""
        ended = and_(t.c.state != UploadState.RUNNING, t.c.created_at < before)
        await self._database.change(delete(t).where(ended))
