"""What an operation's outcome means for the records, before its ticket is done."""

from datetime import timedelta

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import FolderSaved
from twinkle_dask.errors import InvalidRequest, NotFound, StorageFailed, TwinkleDaskError
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.lanes import LaneOperation
from twinkle_dask.operations.requests import (
    LoadState,
    SaveExternal,
    SaveForSampler,
    SaveState,
    StartRun,
    UnloadRun,
)
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.values import (
    CheckpointAddress,
    Exported,
    Loaded,
    RunCreated,
    SamplerSaved,
    Saved,
    Tenant,
    Unloaded,
)
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

    def __init__(
        self,
        store: Store,
        checkpoints: Checkpoints,
        tickets: TicketBoard,
        inflight: InflightWeights,
    ) -> None:
        self._inflight = inflight
        self._store = store
        self._checkpoints = checkpoints
        self._tickets = tickets

    async def finish(
        self, run: RunRecord, operation: LaneOperation, outcome: bytes | TwinkleDaskError
    ) -> None:
        """Record one outcome and complete its ticket.

        Raises:
            StorageFailed: Something could not be stored; call again with the same outcome.
        """
        if isinstance(operation.request, LoadState) and isinstance(outcome, StorageFailed):
            outcome = await self._deleted(operation.request) or outcome
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

    async def _deleted(self, request: LoadState) -> NotFound | None:
        """What to say if the checkpoint was deleted while the load waited for its turn."""
        at = request.address
        if await self._store.checkpoints.has_folder(request.folder):
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
                if request.inflight:
                    await self._inflight.publish(
                        run.id, operation.seq, request.checkpoint_id, request.folder
                    )
                return packing.pack(await self._sampler_saved(run, request))
            case SaveExternal() as request:
                saved = packing.unpack(result)
                await self._add_checkpoint(run, request, CheckpointKind.EXTERNAL, saved.num_bytes)
                address = CheckpointAddress(
                    run=run.id, kind=CheckpointKind.EXTERNAL, name=request.name
                )
                return packing.pack(Exported(address=address, size_bytes=saved.num_bytes))
            case UnloadRun():
                await self._store.runs.set_state(run.id, RunPhase.UNLOADED)
                return packing.pack(Unloaded(run=run.id))
            case _:
                return result

    async def _add_checkpoint(
        self,
        run: RunRecord,
        request: SaveState | SaveForSampler | SaveExternal,
        kind: CheckpointKind,
        num_bytes: int,
    ) -> None:
        now = utc_now()
        record = CheckpointRecord(
            id=request.checkpoint_id,
            tenant_id=run.tenant_id,
            run_id=run.id,
            kind=kind,
            name=request.name,
            path=request.folder,
            base_model=run.base_model,
            spec=run.spec,
            has_optimizer=isinstance(request, SaveState) and request.optimizer,
            size_bytes=num_bytes,
            user_metadata={} if isinstance(request, SaveExternal) else request.user_metadata,
            created_at=now,
            expires_at=None if request.ttl_s is None else now + timedelta(seconds=request.ttl_s),
        )
        overwrite = isinstance(request, SaveState) and request.overwrite
        by = Tenant(id=run.tenant_id, name=request.actor, key_hint=request.key_hint)
        await self._checkpoints.add(record, overwrite=overwrite, by=by)

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
                checkpoint_id=None if request.inflight else request.checkpoint_id,
                follows_run_id=run.id if request.inflight else None,
                created_at=utc_now(),
            )
        )
        return SamplerSaved(sampler=request.sampler)
