"""Saved checkpoints: adding, finding, sharing, expiry, removal.

Several records may name one folder, since copies share their source's files; the files go with the
last of them. A removal takes the record's name and lets its time come first, so that nobody finds
it any more, then removes the files and then the record; ``remove_expired`` goes on with one that
was broken off, or whose files a run had just loaded and still needed.
"""

import asyncio
from collections.abc import Callable, Iterable
from datetime import timedelta

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, NotPermitted, StorageFailed
from twinkle_dask.operations import contents, validation
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.requests import LoadState
from twinkle_dask.operations.values import (
    CheckpointAddress,
    CheckpointInfo,
    Page,
    Tenant,
    TicketKind,
)
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, TenantId

log = structlog.stdlib.get_logger(__name__)


class Checkpoints:
    """A tenant's saved state. Another tenant's looks as if there were none, unless it is public."""

    def __init__(self, store: Store, blobs: BlobStore, audit: Audit) -> None:
        self._store = store
        self._blobs = blobs
        self._audit = audit
        self._on_removed: list[Callable[[str], None]] = []

    def on_removed(self, tell: Callable[[str], None]) -> None:
        """Have ``tell`` called with the id of every checkpoint that is removed."""
        self._on_removed.append(tell)

    async def add(self, record: CheckpointRecord, *, overwrite: bool, by: Tenant) -> None:
        """Record a checkpoint whose files are written. Repeating it changes nothing.

        Raises:
            InvalidRequest: Its name is taken; the files are removed.
        """
        other = await self._store.checkpoints.add(record, overwrite=overwrite)
        if other is not None and other.id != record.id:
            expired = other.expires_at is not None and other.expires_at <= record.created_at
            if not (overwrite or expired):
                await asyncio.to_thread(self._blobs.remove, record.path)
                raise name_taken(record.name)
            await self.remove(other)
        if record.name is not None:
            await self._audit.record(
                by, "checkpoints.created", once=record.id, path=_path(_address(record))
            )

    async def find(self, tenant: TenantId, address: CheckpointAddress) -> CheckpointRecord:
        """A state to go on from or to sample: the tenant's own, or a public one.

        Raises:
            NotFound: There is none that the tenant may read.
            InvalidRequest: It was exported for other programs.
        """
        if address.kind is CheckpointKind.EXTERNAL:
            raise InvalidRequest(
                f"{_path(address)} was exported for other programs and cannot be loaded here. "
                "Load a training checkpoint or sampler weights."
            )
        return await self.readable(tenant, address)

    async def readable(self, tenant: TenantId, address: CheckpointAddress) -> CheckpointRecord:
        """A checkpoint of any kind: the tenant's own, or a public one.

        Raises:
            NotFound: There is none that the tenant may read.
        """
        at = address
        record = await self._store.checkpoints.readable(tenant, at.run, at.kind, at.name)
        if record is None:
            raise _unknown(address)
        return record

    async def own(self, tenant: TenantId, address: CheckpointAddress) -> CheckpointRecord:
        """The tenant's own checkpoint, to be changed.

        Raises:
            NotFound: None of this tenant's.
            NotPermitted: It is public and belongs to another tenant.
        """
        record = await self.readable(tenant, address)
        if record.tenant_id != tenant:
            raise NotPermitted(f"Checkpoint {_path(address)} is not yours; only its owner may.")
        return record

    async def info(self, tenant: Tenant, address: CheckpointAddress) -> CheckpointInfo:
        """What is recorded under an address."""
        return describe(await self.readable(tenant.id, address))

    async def of_run(
        self, tenant: Tenant, run: RunId, *, exports: bool = True
    ) -> tuple[CheckpointInfo, ...]:
        """A run's named checkpoints, oldest first; of another tenant's run the public ones.

        Without ``exports``, only what can be loaded here.

        Raises:
            NotFound: No such run of this tenant, nor one of another's that has public ones.
        """
        records = await self._store.checkpoints.for_run(tenant.id, run)
        if not records and await self._store.runs.get(tenant.id, run) is None:
            raise NotFound(f"There is no run {run!r}.")
        wanted = (r for r in records if exports or r.kind is not CheckpointKind.EXTERNAL)
        return tuple(describe(record) for record in wanted)

    async def page(
        self, tenant: Tenant, limit: int, offset: int, *, exports: bool = True
    ) -> Page[CheckpointInfo]:
        """All of a tenant's named checkpoints, newest first; ``exports`` as in ``of_run``."""
        records, total = await self._store.checkpoints.page(
            tenant.id, limit, offset, exports=exports
        )
        items = tuple(describe(record) for record in records)
        return Page(items=items, total=total, limit=limit, offset=offset)

    async def delete(self, tenant: Tenant, address: CheckpointAddress) -> None:
        """Remove a checkpoint, and its files unless a copy has them."""
        record = await self.own(tenant.id, address)
        # Told as soon as nobody finds it any more, whatever becomes of its files.
        await self._store.checkpoints.retire(record.id, utc_now())
        await self._audit.record(
            tenant, "checkpoints.deleted", once=f"deleted {record.id}", path=_path(address)
        )
        await self.remove(record)

    async def set_ttl(self, tenant: Tenant, address: CheckpointAddress, ttl_s: int | None) -> None:
        """Let a checkpoint expire ``ttl_s`` from now, or never."""
        validation.ttl(ttl_s)
        record = await self.own(tenant.id, address)
        when = None if ttl_s is None else utc_now() + timedelta(seconds=ttl_s)
        if not await self._store.checkpoints.set_expiry(record.id, when):
            raise _unknown(address)
        await self._audit.record(
            tenant,
            "checkpoints.ttl_changed",
            path=_path(address),
            expires_at="never" if when is None else when.isoformat(),
        )

    async def set_public(self, tenant: Tenant, address: CheckpointAddress, *, public: bool) -> None:
        """Let every tenant read a checkpoint, or its owner alone. Repeating it changes nothing."""
        record = await self.own(tenant.id, address)
        if await self._store.checkpoints.set_public(record.id, public):
            event = "checkpoints.published" if public else "checkpoints.unpublished"
            await self._audit.record(tenant, event, path=_path(address))

    async def touch(self, used: Iterable[str]) -> None:
        """Write down that checkpoints were sampled just now."""
        await self._store.checkpoints.touch(used, utc_now())

    async def remove_expired(self) -> None:
        """Delete what has outlived its time, and what was on its way out."""
        for record in await self._store.checkpoints.expired(utc_now()):
            if record.name is not None:
                log.info("checkpoint_expired", run=record.run_id, name=record.name)
                by_itself = Tenant(id=record.tenant_id, name="expiry", key_hint="")
                # Before its name goes, with which a later round could not tell of it.
                await self._audit.record(
                    by_itself,
                    "checkpoints.expired",
                    once=f"expired {record.id}",
                    path=_path(_address(record)),
                )
            await self.try_to_remove(record)

    async def remove_idle(self, idle_s: float) -> None:
        """Delete weights of one sampler alone that nobody sampled for so long."""
        before = utc_now() - timedelta(seconds=idle_s)
        for record in await self._store.checkpoints.idle(before):
            if await self.try_to_remove(record):
                log.info("idle_weights_removed", run=record.run_id)

    async def remove(self, record: CheckpointRecord) -> None:
        """Delete a record and, unless a copy has them, its files.

        A run that has loaded them keeps both until its snapshot is written: until then it could
        not be restored without.

        Raises:
            StorageFailed: Nobody finds it any more, but something of it is left; ``remove_expired``
                tries again.
        """
        await self._store.checkpoints.retire(record.id, utc_now())
        for tell in self._on_removed:
            tell(record.id)
        if not await self._store.checkpoints.is_shared(record):
            if await self._is_to_be_loaded_again(record):
                return
            await asyncio.to_thread(self._blobs.remove, record.path)
        await self._store.checkpoints.delete(record.id)

    async def _is_to_be_loaded_again(self, record: CheckpointRecord) -> bool:
        """Whether restoring a run would begin with these files."""
        if record.kind is CheckpointKind.EXTERNAL:
            return False
        for load in await self._store.journal.loads(TicketKind.LOAD_STATE):
            if load.has_payload:
                request: LoadState = packing.unpack(await contents.payload_of(self._blobs, load))
                if request.folder == record.path:
                    return True
        return False

    async def try_to_remove(self, record: CheckpointRecord) -> bool:
        """One that cannot be removed does not keep the others from going."""
        try:
            await self.remove(record)
        except StorageFailed as error:
            log.warning("checkpoint_not_removed", path=record.path, error=error.message)
            return False
        return True


def describe(record: CheckpointRecord) -> CheckpointInfo:
    """A named checkpoint's record as its readers see it."""
    return CheckpointInfo(
        address=_address(record),
        base_model=record.base_model,
        spec=record.spec,
        created_at=record.created_at,
        expires_at=record.expires_at,
        size_bytes=record.size_bytes,
        public=record.public,
        user_metadata=record.user_metadata,
        tenant=record.tenant_id,
    )


def name_taken(name: str | None) -> InvalidRequest:
    """What to say about a second checkpoint of the same name."""
    return InvalidRequest(
        f"A checkpoint {name!r} of this run exists already; choose another name or overwrite it."
    )


def _address(record: CheckpointRecord) -> CheckpointAddress:
    return CheckpointAddress(run=record.run_id, kind=record.kind, name=record.name or "")


def _path(address: CheckpointAddress) -> str:
    return f"{address.run}/{address.kind}/{address.name}"


def _unknown(address: CheckpointAddress) -> NotFound:
    return NotFound(f"There is no checkpoint {address.kind}/{address.name} of run {address.run!r}.")
