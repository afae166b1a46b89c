"""What an operation's outcome means for the records, before its ticket is done."""

import asyncio
from datetime import timedelta

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import FolderSaved
from twinkle_dask.errors import InvalidRequest, NotFound, StorageFailed, TwinkleDaskError
from twinkle_dask.operations.lanes import LaneOperation
from twinkle_dask.operations.requests import LoadState, SaveForSampler, SaveState, StartRun
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.values import (
    CheckpointAddress,
    Loaded,
    RunCreated,
    SamplerSaved,
    Saved,
)
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import (
    CheckpointKind,
    CheckpointRecord,
    RunPhase,
    RunRecord,
    SamplerRecord,
)
from twinkle_dask.store.store import Store

log = structlog.stdlib.get_logger(__name__)


class Finisher:
    """Turns what a host answered into records and a ticket's outcome.

    Everything here may happen twice, when this process dies in the middle and the journal is
    replayed, so ids and folders come from the request and a second time changes nothing.
    """

    def __init__(self, store: Store, blobs: BlobStore, tickets: TicketBoard) -> None:
        self._store = store
        self._blobs = blobs
        self._tickets = tickets

    async def finish(
        self, run: RunRecord, operation: LaneOperation, outcome: bytes | TwinkleDaskError
    ) -> None:
        """Record one outcome and complete its ticket.

        Raises:
            StorageFailed: Something could not be stored; call again with the same outcome.
        """
        if isinstance(operation.request, LoadState) and isinstance(outcome, StorageFailed):
            outcome = await self._deleted(run, operation.request) or outcome
        if not isinstance(outcome, TwinkleDaskError):
            try:
                result = await self._record(run, operation, outcome)
                await self._tickets.finish(operation.ticket, result)
            except InvalidRequest as error:
                outcome = error
            else:
                return
        if isinstance(operation.request, StartRun | LoadState) and operation.seq == 0:
            await self._store.runs.set_state(run.id, RunPhase.FAILED)
        log.warning(
            "operation_failed",
            run=run.id,
            seq=operation.seq,
            kind=type(operation.request).__name__,
            error=outcome.message,
        )
        await self._tickets.fail(operation.ticket, outcome)

    async def _deleted(self, run: RunRecord, request: LoadState) -> NotFound | None:
        """What to say if the checkpoint was deleted while the load waited for its turn."""
        at = request.address
        record = await self._store.checkpoints.get(run.tenant_id, at.run, at.kind, at.name)
        if record is not None and record.path == request.folder:
            return None
        return NotFound(f"Checkpoint {at.kind}/{at.name} of run {at.run!r} was deleted meanwhile.")

    async def _record(self, run: RunRecord, operation: LaneOperation, result: bytes) -> bytes:
        match operation.request:
            case StartRun():
                await self._store.runs.set_state(run.id, RunPhase.READY)
                return packing.pack(RunCreated(run=run.id))
            case LoadState() as request:
                await self._store.runs.set_state(run.id, RunPhase.READY)
                return packing.pack(Loaded(run=run.id, address=request.address))
            case SaveState() as request:
                saved: FolderSaved = packing.unpack(result)
                await self._add_checkpoint(run, request, CheckpointKind.TRAINING, saved.num_bytes)
                address = CheckpointAddress(
                    run=run.id, kind=CheckpointKind.TRAINING, name=request.name
                )
                return packing.pack(Saved(address=address))
            case SaveForSampler() as request:
                saved = packing.unpack(result)
                await self._add_checkpoint(run, request, CheckpointKind.SAMPLER, saved.num_bytes)
                return packing.pack(await self._sampler_saved(run, request))
            case _:
                return result

    async def _add_checkpoint(
        self,
        run: RunRecord,
        request: SaveState | SaveForSampler,
        kind: CheckpointKind,
        num_bytes: int,
    ) -> None:
        now = utc_now()
        overwrite = isinstance(request, SaveState) and request.overwrite
        expires_at = None if request.ttl_s is None else now + timedelta(seconds=request.ttl_s)
        record = CheckpointRecord(
            id=request.checkpoint_id,
            tenant_id=run.tenant_id,
            run_id=run.id,
            kind=kind,
            name=request.name,
            path=request.folder,
            base_model=run.base_model,
            spec=run.spec,
            has_optimizer=isinstance(request, SaveState),
            size_bytes=num_bytes,
            user_metadata=request.user_metadata,
            created_at=now,
            expires_at=expires_at,
        )
        other = await self._store.checkpoints.add(record, overwrite=overwrite)
        if other is None or other.id == record.id:
            return
        if overwrite:
            await asyncio.to_thread(self._blobs.remove, other.path)
            return
        await asyncio.to_thread(self._blobs.remove, record.path)
        raise InvalidRequest(
            f"A checkpoint {request.name!r} of this run exists already; choose another name or "
            "overwrite it."
        )

    async def _sampler_saved(self, run: RunRecord, request: SaveForSampler) -> SamplerSaved:
        if request.sampler is None or request.sampler_seq is None:
            address = CheckpointAddress(
                run=run.id, kind=CheckpointKind.SAMPLER, name=request.name or ""
            )
            return SamplerSaved(address=address)
        await self._store.samplers.add(
            SamplerRecord(
                id=request.sampler,
                session_id=run.session_id,
                tenant_id=run.tenant_id,
                sampler_seq=request.sampler_seq,
                base_model=run.base_model,
                checkpoint_id=request.checkpoint_id,
                created_at=utc_now(),
            )
        )
        return SamplerSaved(sampler=request.sampler)
