"""Who did what: an event for everything that changes who can reach what."""

import uuid

from twinkle_dask.clock import utc_now
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import AuditRecord
from twinkle_dask.store.store import Store


class Audit:
    """Writes the audit trail."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(self, tenant: Tenant, event: str, **details: str) -> None:
        """Write down what a tenant has just done; returns when it is durable.

        Args:
            tenant: Who did it; the end of the key that was used is kept with the event.
            event: ``<family>.<what>`` with the family ``checkpoints``, ``projects``, ``keys`` or
                ``sessions``.
            details: What it was done to.
        """
        await self._store.audit.add(
            AuditRecord(
                id=uuid.uuid4().hex,
                tenant_id=tenant.id,
                event=event,
                details={**details, "actor": tenant.name, "key_hint": tenant.key_hint},
                created_at=utc_now(),
            )
        )
