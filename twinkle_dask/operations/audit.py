"""Who did what: an event for everything that changes who can reach what."""

import uuid
from datetime import UTC, date, datetime, time, timedelta

from twinkle_dask.clock import utc_now
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import AuditRecord
from twinkle_dask.store.store import Store

#: Of one day; the newest.
_MAX_ENTRIES = 10_000


class Audit:
    """Writes and reads the audit trail."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(
        self, tenant: Tenant, event: str, *, once: str | None = None, **details: str
    ) -> None:
        """Write down what a tenant has just done; returns when it is durable.

        Args:
            tenant: Who did it; the end of the key that was used is kept with the event.
            event: ``<family>.<what>`` with the family ``checkpoints``, ``projects``, ``keys`` or
                ``sessions``.
            once: An id; what was written under it before is not written again.
            details: What it was done to.
        """
        await self._store.audit.add(
            AuditRecord(
                id=once or uuid.uuid4().hex,
                tenant_id=tenant.id,
                event=event,
                details={
                    **details,
                    "actor": tenant.key_name or tenant.name,
                    "key_hint": tenant.key_hint,
                },
                created_at=utc_now(),
            )
        )

    async def of_day(
        self, tenant: Tenant, day: date | None, *, family: str | None
    ) -> tuple[AuditRecord, ...]:
        """What a tenant did from midnight to midnight UTC, newest first.

        Args:
            tenant: Who asks.
            day: Today, if it is None.
            family: The word before the dot in an event; None for all.
        """
        start = datetime.combine(day or utc_now().date(), time(), UTC)
        end = (
            start + timedelta(days=1)
            if start.date() < date.max
            else datetime.max.replace(tzinfo=UTC)
        )
        return await self._store.audit.between(
            tenant.id, start, end, family=family, limit=_MAX_ENTRIES
        )
