"""Samplers, and drawing from them. Samples have no order: each goes to a host on its own."""

import asyncio
import secrets
from dataclasses import dataclass, replace

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import Cancel, Command, Sample
from twinkle_dask.cluster.link import HostLink
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import (
    HostLost,
    InvalidRequest,
    NotFound,
    ServiceFault,
    SessionEnded,
    StorageFailed,
    TwinkleDaskError,
)
from twinkle_dask.operations import contents, validation
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.values import (
    CheckpointAddress,
    SamplerInfo,
    ServedModel,
    Tenant,
    Ticket,
    TicketKind,
)
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.journal import DuplicateOperation
from twinkle_dask.store.records import OperationRecord, SamplerRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, SampleRequest, SamplerId, SessionId, TenantId, TicketId

log = structlog.stdlib.get_logger(__name__)

_MAX_LOSSES = 4
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handle:
    """A sampler as it is used: ``folder`` holds its weights, None is the base model."""

    record: SamplerRecord
    model: ServedModel
    folder: str | None
    address: CheckpointAddress | None


class Sampling:
    """All samplers of all tenants."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        supervisor: Supervisor,
        catalogue: Catalogue,
        sessions: Sessions,
        checkpoints: Checkpoints,
        tickets: TicketBoard,
        limits: LimitConfig,
        quotas: Quotas,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._supervisor = supervisor
        self._catalogue = catalogue
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._tickets = tickets
        self._limits = limits
        self._quotas = quotas
        self._handles: dict[SamplerId, _Handle] = {}
        self._submits: dict[tuple[SamplerId, int], asyncio.Task[Ticket]] = {}
        self._drawing: dict[TicketId, asyncio.Task[None]] = {}
        self._owners: dict[TicketId, TenantId] = {}

    async def create(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        base_model: str | None,
        address: CheckpointAddress | None,
    ) -> SamplerInfo:
        """Make a sampler of saved weights, or of the base model. An address wins over a name."""
        await self._sessions.active(tenant, session)
        checkpoint_id = None
        if address is not None:
            checkpoint = await self._checkpoints.find(tenant.id, address)
            checkpoint_id, base_model = checkpoint.id, checkpoint.base_model
        if base_model is None:
            raise InvalidRequest("Give a base_model or a model_path.")
        model = validation.sampled(self._catalogue.get(base_model))
        record = await self._store.samplers.add(
            SamplerRecord(
                id=SamplerId(f"{session}:sample:{seq}"),
                session_id=session,
                tenant_id=tenant.id,
                sampler_seq=seq,
                base_model=model.name,
                checkpoint_id=checkpoint_id,
                created_at=utc_now(),
            )
        )
        return await self.info(tenant, record.id)

    async def info(self, tenant: Tenant, sampler: SamplerId) -> SamplerInfo:
        """What a sampler samples."""
        handle = await self._handle(tenant.id, sampler)
        return SamplerInfo(sampler=sampler, base_model=handle.model.name, address=handle.address)

    async def sample(
        self, tenant: Tenant, sampler: SamplerId, *, seq: int | None, request: SampleRequest
    ) -> Ticket:
        """Acknowledge a sample. ``seq`` is an identity: a repeat gives the same ticket.

        Raises:
            QuotaExceeded: The tenant has too much in flight; try again later.
        """
        handle = await self._handle(tenant.id, sampler)
        if not self._sessions.is_active(handle.record.session_id):
            raise SessionEnded(f"The session of sampler {sampler!r} is over; create a new one.")
        self._sessions.touch(handle.record.session_id)
        validation.sample(request, handle.model, self._limits)
        if seq is None:
            return await self._submit(tenant, handle, None, request)
        submit = self._submits.get((sampler, seq))
        if submit is None:
            submit = asyncio.create_task(self._submit(tenant, handle, seq, request))
            self._submits[sampler, seq] = submit
            submit.add_done_callback(lambda _: self._submits.pop((sampler, seq), None))
        return await asyncio.shield(submit)

    async def cancel(self, tenant: Tenant, ticket: TicketId) -> None:
        """Stop drawing; the ticket fails. A finished one stays as it is.

        Raises:
            NotFound: No such ticket of this tenant.
        """
        drawing = self._drawing.get(ticket)
        if drawing is None or self._owners[ticket] != tenant.id:
            if await self._store.journal.get(tenant.id, ticket) is None:
                raise NotFound(f"There is no request {ticket!r}.")
            return
        drawing.cancel()
        await self._tickets.fail(ticket, InvalidRequest("The request was cancelled."))

    async def recover(self) -> None:
        """Draw what a server before us acknowledged and did not finish."""
        for record in await self._store.journal.pending():
            if record.sampler_id is None or not record.has_payload:
                continue
            try:
                handle = await self._handle(record.tenant_id, record.sampler_id)
            except NotFound as error:
                self._open_ticket(record)
                await self._tickets.fail(record.ticket_id, error)
                continue
            except TwinkleDaskError as error:
                log.warning("sample_not_recovered", ticket=record.ticket_id, error=error.message)
                continue
            self._open_ticket(record)
            try:
                payload = await contents.payload_of(self._blobs, record)
            except StorageFailed as error:
                await self._tickets.fail(record.ticket_id, error)
                continue
            self._quotas.samples.restore(record.tenant_id)
            self._start(record.ticket_id, handle, payload)

    def _open_ticket(self, record: OperationRecord) -> None:
        self._quotas.queued_bytes.restore(record.tenant_id, record.payload_bytes)
        self._tickets.open(record.tenant_id, record.ticket_id, record.payload_bytes)

    async def stop(self) -> None:
        """End all drawing; the journal keeps what is not done."""
        drawing = list(self._drawing.values())
        for task in drawing:
            task.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)

    def forget_ended(self) -> None:
        """Take the samplers of ended sessions out of memory; a drawing keeps what it needs."""
        self._handles = {
            sampler: handle
            for sampler, handle in self._handles.items()
            if self._sessions.is_active(handle.record.session_id)
        }

    async def _handle(self, tenant: TenantId, sampler: SamplerId) -> _Handle:
        handle = self._handles.get(sampler)
        if handle is None:
            record = await self._store.samplers.get(tenant, sampler)
            if record is None:
                raise NotFound(f"There is no sampler {sampler!r}.")
            handle = self._handles[sampler] = await self._open(record)
        if handle.record.tenant_id != tenant:
            raise NotFound(f"There is no sampler {sampler!r}.")
        return handle

    async def _open(self, record: SamplerRecord) -> _Handle:
        folder = address = None
        if record.checkpoint_id is not None:
            checkpoint = await self._store.checkpoints.by_id(record.tenant_id, record.checkpoint_id)
            if checkpoint is None:
                raise _deleted(record)
            folder = checkpoint.path
            if checkpoint.name is not None:
                run = RunId(checkpoint.run_id)
                address = CheckpointAddress(run=run, kind=checkpoint.kind, name=checkpoint.name)
        model = validation.sampled(self._catalogue.get(record.base_model))
        return _Handle(record=record, model=model, folder=folder, address=address)

    async def _submit(
        self, tenant: Tenant, handle: _Handle, seq: int | None, request: SampleRequest
    ) -> Ticket:
        if request.params.seed is None:
            # Drawn here and kept in the journal, so that doing it again gives the same tokens.
            params = replace(request.params, seed=secrets.randbits(62))
            request = replace(request, params=params)
        payload = packing.pack(request)
        try:
            with (
                self._quotas.samples.taking(tenant.id),
                self._quotas.queued_bytes.taking(tenant.id, len(payload)),
            ):
                return await self._acknowledge(tenant, handle, seq, request, payload)
        except DuplicateOperation as duplicate:
            return _ticket(duplicate.stored)

    async def _acknowledge(
        self,
        tenant: Tenant,
        handle: _Handle,
        seq: int | None,
        request: SampleRequest,
        payload: bytes,
    ) -> Ticket:
        ticket = TicketId(secrets.token_hex(12))
        kept = await contents.keep(self._blobs, f"journal/{ticket}", payload)
        record = OperationRecord(
            ticket_id=ticket,
            tenant_id=tenant.id,
            kind=TicketKind.SAMPLE,
            sampler_id=handle.record.id,
            seq=seq,
            payload=kept.inline,
            payload_path=kept.path,
            payload_bytes=len(payload),
            sequence_ids=tuple(f"{ticket}-{i}" for i in range(request.num_samples)),
            created_at=utc_now(),
        )
        try:
            await self._store.journal.add(record)
        except DuplicateOperation:
            await contents.discard(self._blobs, kept)
            raise
        self._tickets.open(tenant.id, ticket, len(payload))
        self._start(ticket, handle, payload)
        return _ticket(record)

    def _start(self, ticket: TicketId, handle: _Handle, payload: bytes) -> None:
        task = asyncio.create_task(self._draw(ticket, handle, payload), name=f"sample {ticket}")
        self._drawing[ticket] = task
        self._owners[ticket] = handle.record.tenant_id
        task.add_done_callback(lambda done: self._drawn(ticket, done))

    def _drawn(self, ticket: TicketId, task: "asyncio.Task[None]") -> None:
        del self._drawing[ticket]
        self._quotas.samples.remove(self._owners.pop(ticket))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("sample_failed", ticket=ticket, exc_info=error)

    async def _draw(self, ticket: TicketId, handle: _Handle, payload: bytes) -> None:
        structlog.contextvars.bind_contextvars(ticket=ticket, sampler=handle.record.id)
        try:
            outcome = await self._attempt(handle, payload)
        except asyncio.CancelledError:
            raise
        except TwinkleDaskError as error:
            outcome = await self._reason(handle.record, error)
        except Exception:
            log.exception("sample_failed")
            outcome = ServiceFault("The sample failed; the service's log has the details.")
        while True:
            try:
                if isinstance(outcome, bytes):
                    await self._tickets.finish(ticket, outcome)
                else:
                    await self._tickets.fail(ticket, outcome)
            except StorageFailed as error:
                log.warning("outcome_not_stored", error=error.message)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _attempt(self, handle: _Handle, payload: bytes) -> bytes:
        """Draw on one host after the other until one answers, with the same seed."""
        body = packing.pack(Sample(request=payload, adapter=handle.folder))
        for _ in range(_MAX_LOSSES):
            link = await self._supervisor.sampler(handle.model.source, handle.folder)
            command = Command(
                id=secrets.token_hex(12),
                run=RunId(""),
                tenant=handle.record.tenant_id,
                body=body,
            )
            try:
                return await link.send(command)
            except HostLost as error:
                log.warning("sample_sent_again", why=error.message)
            except asyncio.CancelledError:
                self._cancel_on(link, command)
                raise
        raise ServiceFault(f"The host went down {_MAX_LOSSES} times while this was drawn.")

    async def _reason(self, sampler: SamplerRecord, error: TwinkleDaskError) -> TwinkleDaskError:
        """Why a sample failed: weights that cannot be read may be ones that their owner deleted."""
        if isinstance(error, StorageFailed) and sampler.checkpoint_id is not None:
            weights = await self._store.checkpoints.by_id(sampler.tenant_id, sampler.checkpoint_id)
            if weights is None:
                return _deleted(sampler)
        return error

    def _cancel_on(self, link: HostLink, command: Command) -> None:
        cancel = Command(
            id=secrets.token_hex(12),
            run=RunId(""),
            tenant=command.tenant,
            body=packing.pack(Cancel(command_id=command.id)),
        )
        answer = link.send(cancel)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())


def _ticket(record: OperationRecord) -> Ticket:
    return Ticket(id=record.ticket_id, kind=TicketKind.SAMPLE, sequence_ids=record.sequence_ids)


def _deleted(sampler: SamplerRecord) -> NotFound:
    return NotFound(f"The weights of sampler {sampler.id!r} were deleted; create a new sampler.")
