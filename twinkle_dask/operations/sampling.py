"""What a tenant may ask of samplers: the acknowledged submit, cancelling, and many results at once.

Samples have no order: each goes to a host on its own.
"""

import asyncio
import secrets
from dataclasses import replace

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import (
    InvalidRequest,
    NotFound,
    StorageFailed,
    TwinkleDaskError,
)
from twinkle_dask.operations import contents, validation
from twinkle_dask.operations.drawing import Draw, Drawing
from twinkle_dask.operations.events import Clone, Completions, Events
from twinkle_dask.operations.following import Following
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.recording import sequence_ids
from twinkle_dask.operations.samplers import Handle, Samplers
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.usage import input_tokens
from twinkle_dask.operations.values import Tenant, Ticket, TicketKind
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.journal import DuplicateOperation
from twinkle_dask.store.records import OperationRecord, OperationState
from twinkle_dask.store.store import Store
from twinkle_dask.types import SampleRequest, SamplerId, TicketId

log = structlog.stdlib.get_logger(__name__)

#: Prompts with larger images are handled on a thread, so that the event loop keeps turning.
_INLINE_IMAGE_BYTES = 2**20


class Sampling:
    """Samples of all tenants."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        samplers: Samplers,
        drawing: Drawing,
        tickets: TicketBoard,
        events: Events,
        limits: LimitConfig,
        quotas: Quotas,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._samplers = samplers
        self._drawing = drawing
        self._tickets = tickets
        self._events = events
        self._limits = limits
        self._quotas = quotas
        self._submits: dict[tuple[SamplerId, int], asyncio.Task[Ticket]] = {}

    async def sample(
        self, tenant: Tenant, sampler: SamplerId, *, seq: int | None, request: SampleRequest
    ) -> Ticket:
        """Acknowledge a sample. ``seq`` is an identity: a repeat gives the same ticket.

        Raises:
            QuotaExceeded: The tenant has too much in flight; try again later.
        """
        handle = await self._samplers.alive(tenant, sampler)
        request = await self._checked(request, handle)
        if seq is None:
            return await self._submit(tenant, handle, None, request)
        submit = self._submits.get((sampler, seq))
        if submit is None:
            submit = asyncio.create_task(self._submit(tenant, handle, seq, request))
            self._submits[sampler, seq] = submit
            submit.add_done_callback(lambda _: self._submits.pop((sampler, seq), None))
        return await asyncio.shield(submit)

    async def follow(
        self, tenant: Tenant, sampler: SamplerId, request: SampleRequest
    ) -> tuple[Ticket, Following]:
        """Acknowledge a sample, and give what it draws as it comes.

        The ticket's outcome is there once the parts have ended. Whoever stops following should
        ``cancel`` the ticket, or it is drawn to its end.

        Raises:
            QuotaExceeded: The tenant has too much in flight; try again later.
        """
        handle = await self._samplers.alive(tenant, sampler)
        request = await self._checked(request, handle)
        following = Following()
        return await self._submit(tenant, handle, None, request, following), following

    async def cancel(self, tenant: Tenant, ticket: TicketId) -> None:
        """Stop drawing; the ticket fails. A finished one stays as it is.

        Raises:
            NotFound: No such ticket of this tenant.
            InvalidRequest: It is the work of a run, which goes on in its order.
        """
        draw = self._drawing.find(ticket)
        if draw is not None and draw.handle.record.tenant_id == tenant.id:
            await self._drawing.cancel(draw)
            return
        record = await self._store.journal.get(tenant.id, ticket)
        if record is None:
            raise NotFound(f"There is no request {ticket!r}.")
        if record.state is not OperationState.PENDING:
            return
        if record.run_id is not None:
            raise InvalidRequest(
                f"{record.kind} cannot be cancelled: what comes after it in run {record.run_id!r} "
                "builds on it. Only samples can be cancelled."
            )
        # Its model is not served at the moment, so nobody draws it.
        await self._tickets.fail(ticket, InvalidRequest("The request was cancelled."))

    async def completions(
        self,
        tenant: Tenant,
        clone: Clone,
        *,
        after: int,
        retrieved: tuple[TicketId, ...],
        timeout_s: float,
    ) -> Completions:
        """Which samples of one client have ended; see ``Events.wait``.

        Args:
            tenant: Who asks.
            clone: Their sampler and the number of its client.
            after: The place that the client has seen.
            retrieved: Tickets whose results it has; they need not be kept at hand.
            timeout_s: How long to wait for the first.

        Raises:
            NotFound: No such sampler of this tenant.
        """
        if await self._store.samplers.get(tenant.id, clone.sampler) is None:
            raise NotFound(f"There is no sampler {clone.sampler!r}.")
        self._tickets.retrieved(tenant.id, retrieved)
        return await self._events.wait(clone, after=after, timeout_s=timeout_s)

    async def recover(self) -> None:
        """Draw what a server before us acknowledged and did not finish."""
        for record in await self._store.journal.pending():
            if record.sampler_id is None or not record.has_payload:
                continue
            try:
                handle = await self._samplers.find(record.tenant_id, record.sampler_id)
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
                request: SampleRequest = packing.unpack(payload)
            except (StorageFailed, packing.UnreadableBuffer) as error:
                fault = StorageFailed(f"The request could not be read back: {error}")
                await self._tickets.fail(record.ticket_id, fault)
                continue
            self._quotas.samples.restore(record.tenant_id)
            self._drawing.start(
                Draw(
                    ticket=record.ticket_id,
                    handle=handle,
                    seq=record.seq,
                    payload=payload,
                    recorded=request.recorded,
                )
            )

    def _open_ticket(self, record: OperationRecord) -> None:
        self._quotas.queued_bytes.restore(record.tenant_id, record.payload_bytes)
        self._tickets.open(record.tenant_id, record.ticket_id, record.payload_bytes)

    async def stop(self) -> None:
        """End all drawing; the journal keeps what is not done."""
        await self._drawing.stop()

    async def _checked(self, request: SampleRequest, handle: Handle) -> SampleRequest:
        if _is_large(request):
            check = validation.sample
            return await asyncio.to_thread(check, request, handle.model, self._limits)
        return validation.sample(request, handle.model, self._limits)

    async def _submit(
        self,
        tenant: Tenant,
        handle: Handle,
        seq: int | None,
        request: SampleRequest,
        following: Following | None = None,
    ) -> Ticket:
        if request.params.seed is None:
            # Drawn here and kept in the journal, so that doing it again gives the same tokens.
            params = replace(request.params, seed=secrets.randbits(62))
            request = replace(request, params=params)
        tokens = validation.input_tokens(input_tokens(request), self._limits)
        self._quotas.rates.admit(tenant.id, tokens)
        if _is_large(request):
            payload = await asyncio.to_thread(packing.pack, request)
        else:
            payload = packing.pack(request)
        try:
            with (
                self._quotas.samples.taking(tenant.id),
                self._quotas.queued_bytes.taking(tenant.id, len(payload)),
            ):
                return await self._acknowledge(tenant, handle, seq, request, payload, following)
        except DuplicateOperation as duplicate:
            return _ticket(duplicate.stored)

    async def _acknowledge(
        self,
        tenant: Tenant,
        handle: Handle,
        seq: int | None,
        request: SampleRequest,
        payload: bytes,
        following: Following | None,
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
            sequence_ids=sequence_ids(ticket, request.num_samples),
            created_at=utc_now(),
            key_id=tenant.key_id,
            input_tokens=input_tokens(request),
        )
        try:
            await self._store.journal.add(record)
        except DuplicateOperation:
            await contents.discard(self._blobs, kept)
            raise
        self._tickets.open(tenant.id, ticket, len(payload))
        self._drawing.start(
            Draw(
                ticket=ticket,
                handle=handle,
                seq=seq,
                payload=payload,
                recorded=request.recorded,
                following=following,
            )
        )
        return _ticket(record)


def _ticket(record: OperationRecord) -> Ticket:
    return Ticket(id=record.ticket_id, kind=TicketKind.SAMPLE, sequence_ids=record.sequence_ids)


def _is_large(request: SampleRequest) -> bool:
    return sum(len(image.data) for image in request.images) > _INLINE_IMAGE_BYTES
