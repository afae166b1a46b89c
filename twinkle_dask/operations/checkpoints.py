"""Saved checkpoints: finding, listing, expiry, deletion."""

import asyncio
from datetime import timedelta

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import NotFound
from twinkle_dask.operations import validation
from twinkle_dask.operations.values import CheckpointAddress, CheckpointInfo, Page, Tenant
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import CheckpointRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, TenantId

log = structlog.stdlib.get_logger(__name__)


class Checkpoints:
    """A tenant's saved state. Another tenant's looks as if it did not exist."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        self._store = store
        self._blobs = blobs

    async def find(self, tenant: TenantId, address: CheckpointAddress) -> CheckpointRecord:
        """The record under an address.

        Raises:
            NotFound: None of this tenant's, or it has expired.
        """
        record = await self._store.checkpoints.get(tenant, address.run, address.kind, address.name)
        if record is None or (record.expires_at is not None and record.expires_at <= utc_now()):
            raise NotFound(
                f"There is no checkpoint {address.kind}/{address.name} of run {address.run!r}."
            )
        return record

    async def info(self, tenant: Tenant, address: CheckpointAddress) -> CheckpointInfo:
        """What is recorded under an address."""
        return describe(await self.find(tenant.id, address))

    async def of_run(self, tenant: Tenant, run: RunId) -> tuple[CheckpointInfo, ...]:
        """A run's named checkpoints, oldest first."""
        records = await self._store.checkpoints.for_run(tenant.id, run)
        return tuple(describe(record) for record in records)

    async def page(self, tenant: Tenant, limit: int, offset: int) -> Page[CheckpointInfo]:
        """All of a tenant's named checkpoints, newest first."""
        records, total = await self._store.checkpoints.page(tenant.id, limit, offset)
        items = tuple(describe(record) for record in records)
        return Page(items=items, total=total, limit=limit, offset=offset)

    async def delete(self, tenant: Tenant, address: CheckpointAddress) -> None:
        """Remove a checkpoint and its files."""
        await self.remove(await self.find(tenant.id, address))

    async def set_ttl(self, tenant: Tenant, address: CheckpointAddress, ttl_s: int | None) -> None:
        """Let a checkpoint expire ``ttl_s`` from now, or never."""
        validation.ttl(ttl_s)
        record = await self.find(tenant.id, address)
        when = None if ttl_s is None else utc_now() + timedelta(seconds=ttl_s)
        await self._store.checkpoints.set_expiry(record.id, when)

    async def remove_expired(self) -> None:
        """Delete what has outlived its time."""
        for record in await self._store.checkpoints.expired(utc_now()):
            await self.remove(record)
            log.info("checkpoint_expired", run=record.run_id, name=record.name)

    async def remove(self, record: CheckpointRecord) -> None:
        """Delete a record first and its files then, so that no listing shows a phantom."""
        await self._store.checkpoints.delete(record.id)
        await asyncio.to_thread(self._blobs.remove, record.path)


def describe(record: CheckpointRecord) -> CheckpointInfo:
    """A named checkpoint's record as its owner sees it."""
    return CheckpointInfo(
        address=CheckpointAddress(run=record.run_id, kind=record.kind, name=record.name or ""),
        base_model=record.base_model,
        spec=record.spec,
        created_at=record.created_at,
        expires_at=record.expires_at,
        size_bytes=record.size_bytes,
        public=record.public,
        user_metadata=record.user_metadata,
    )
