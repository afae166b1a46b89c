"""The audit trail. Events are added and read, never changed."""

from datetime import datetime

from sqlalchemy import and_, select

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import AuditRecord
from twinkle_dask.store.tables import audit_events as t
from twinkle_dask.types import TenantId


class AuditEvents:
    """What all tenants did."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, event: AuditRecord) -> None:
        """Append an event."""
        await self._database.insert(t, event, lambda: t.c.id == event.id)

    async def between(
        self, tenant: TenantId, start: datetime, end: datetime, *, family: str | None, limit: int
    ) -> tuple[AuditRecord, ...]:
        """A tenant's events from ``start`` up to but without ``end``, newest first.

        Args:
            tenant: Whose.
            start: Aware.
            end: Aware.
            family: The word before the dot in ``event``; None for all.
            limit: At most so many.
        """
        chosen = and_(t.c.tenant_id == tenant, t.c.created_at >= start, t.c.created_at < end)
        if family is not None:
            chosen = and_(chosen, t.c.event.startswith(f"{family}.", autoescape=True))
        query = select(t).where(chosen).order_by(t.c.created_at.desc(), t.c.id).limit(limit)
        return await self._database.all(AuditRecord, query)
