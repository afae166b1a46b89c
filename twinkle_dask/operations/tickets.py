"""Results to come. Completion wakes whoever waits in this process; nothing polls a table.

Finished outcomes stay in memory up to a bound, since most are fetched at once; older ones are
read from the store.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import Failure
from twinkle_dask.errors import NotFound, ServiceFault, TwinkleDaskError
from twinkle_dask.operations import contents, usage
from twinkle_dask.operations.quotas import Quota
from twinkle_dask.operations.values import Done, Failed, Outcome, Result, Waiting
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import OperationRecord, OperationState
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, TenantId, TicketId

log = structlog.stdlib.get_logger(__name__)

_R = TypeVar("_R")
_KEEP_BYTES = 256 * 2**20
#: A result that is awaited to the end is asked for in pieces of this.
_RESULT_S = 60.0


@dataclass(slots=True)
class _Entry:
    tenant: TenantId
    run: RunId | None
    future: "asyncio.Future[Outcome]"
    payload_bytes: int
    num_bytes: int = 0


class TicketBoard:
    """All tickets that are pending, and the newest of those that are not."""

    def __init__(self, store: Store, blobs: BlobStore, queued_bytes: Quota) -> None:
        self._store = store
        self._queued_bytes = queued_bytes
        self._blobs = blobs
        self._pending: dict[TicketId, _Entry] = {}
        self._finished: OrderedDict[TicketId, _Entry] = OrderedDict()
        self._finished_bytes = 0
        self._delivered: set[TicketId] = set()

    def open(
        self,
        tenant: TenantId,
        ticket: TicketId,
        payload_bytes: int,
        *,
        run: RunId | None = None,
    ) -> None:
        """A new ticket, or one found pending in the journal.

        Args:
            tenant: Whose it is.
            ticket: Its id.
            payload_bytes: Counted for the tenant already; given back with the outcome.
            run: Which run's work it is; None for samples.
        """
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending[ticket] = _Entry(
            tenant=tenant, run=run, future=future, payload_bytes=payload_bytes
        )

    def is_pending(self, ticket: TicketId) -> bool:
        """Whether the ticket's operation is on its way in this process."""
        return ticket in self._pending

    def num_pending(self, tenant: TenantId) -> int:
        """How many of a tenant's operations have no outcome yet."""
        return sum(entry.tenant == tenant for entry in self._pending.values())

    def run_of(self, ticket: TicketId) -> RunId | None:
        """The run whose work a pending ticket is; None if it is no run's, or not pending."""
        entry = self._pending.get(ticket)
        return None if entry is None else entry.run

    async def finish(self, ticket: TicketId, result: bytes) -> None:
        """Make a packed result durable, then wake whoever waits.

        Raises:
            StorageFailed: The result could not be stored; the ticket stays pending.
        """
        outcome: Result = packing.unpack(result)
        kept = await contents.keep(self._blobs, f"results/{ticket}", result)
        first = await self._store.journal.finish(
            ticket,
            result=kept.inline,
            result_path=kept.path,
            result_bytes=len(result),
            when=utc_now(),
            output_tokens=usage.output_tokens(outcome),
            used=usage.used(outcome),
        )
        if first:
            self._settle(ticket, Done(result=outcome), len(result))
        else:
            await self._settle_as_stored(ticket)

    async def fail(self, ticket: TicketId, error: TwinkleDaskError) -> None:
        """Make a failure durable, then wake whoever waits."""
        failure = Failure.of(error)
        first = await self._store.journal.fail(
            ticket, kind=failure.kind, message=failure.message, when=utc_now()
        )
        if first:
            self._settle(ticket, Failed(error=error), 0)
        else:
            await self._settle_as_stored(ticket)

    async def result(self, tenant: TenantId, ticket: TicketId) -> Any:
        """Wait for a result however long it takes; its type follows from the ticket's operation.

        Raises:
            NotFound: No such ticket of this tenant.
            TwinkleDaskError: What became of it instead.
        """
        while True:
            outcome = await self.wait(tenant, ticket, _RESULT_S)
            if isinstance(outcome, Failed):
                raise outcome.error
            if isinstance(outcome, Done):
                return outcome.result

    async def take(self, tenant: TenantId, ticket: TicketId, kind: type[_R]) -> _R:
        """Wait for a result of ``kind`` that nobody else asks for; it counts as delivered.

        Raises:
            NotFound: No such ticket of this tenant.
            TwinkleDaskError: What became of it instead.
        """
        result = await self.result(tenant, ticket)
        if not isinstance(result, kind):
            raise ServiceFault(f"The answer is a {type(result).__name__}.")
        self.retrieved(tenant, [ticket])
        return result

    async def wait(self, tenant: TenantId, ticket: TicketId, timeout_s: float) -> Outcome:
        """The outcome, or ``Waiting`` once the time is over.

        Raises:
            NotFound: No such ticket of this tenant.
        """
        entry = self._pending.get(ticket) or self._finished.get(ticket)
        if entry is None:
            outcome = await self._stored(tenant, ticket)
            if isinstance(outcome, Waiting):
                # In the journal, but its model is not served at the moment. Held like any other,
                # because the client polls again at once.
                await asyncio.sleep(timeout_s)
            return outcome
        if entry.tenant != tenant:
            raise _unknown(ticket)
        try:
            outcome = await asyncio.wait_for(asyncio.shield(entry.future), timeout_s)
        except TimeoutError:
            return Waiting()
        self._delivered.add(ticket)
        return outcome

    def retrieved(self, tenant: TenantId, tickets: Iterable[TicketId]) -> None:
        """The tenant's client has these outcomes, so they need not be kept in memory."""
        for ticket in tickets:
            entry = self._finished.get(ticket)
            if entry is not None and entry.tenant == tenant:
                del self._finished[ticket]
                self._finished_bytes -= entry.num_bytes
                self._delivered.add(ticket)

    def take_delivered(self) -> set[TicketId]:
        """Tickets whose outcome was handed out since the last call."""
        delivered, self._delivered = self._delivered, set()
        return delivered

    async def _settle_as_stored(self, ticket: TicketId) -> None:
        """Give an outcome that is in the journal to whoever waits, if nobody has done so.

        It is of one who came first, or our own, from a commit whose answer was lost.
        """
        entry = self._pending.get(ticket)
        record = None if entry is None else await self._store.journal.get(entry.tenant, ticket)
        if record is not None and record.state is not OperationState.PENDING:
            self._settle(ticket, await self._read(record), record.result_bytes)

    def _settle(self, ticket: TicketId, outcome: Outcome, num_bytes: int) -> None:
        entry = self._pending.pop(ticket, None)
        if entry is None:
            return
        self._queued_bytes.remove(entry.tenant, entry.payload_bytes)
        if not entry.future.done():
            entry.future.set_result(outcome)
        entry.num_bytes = num_bytes
        self._finished[ticket] = entry
        self._finished_bytes += num_bytes
        while self._finished_bytes > _KEEP_BYTES or len(self._finished) > 10_000:
            _, old = self._finished.popitem(last=False)
            self._finished_bytes -= old.num_bytes

    async def _stored(self, tenant: TenantId, ticket: TicketId) -> Outcome:
        record = await self._store.journal.get(tenant, ticket)
        if record is None:
            raise _unknown(ticket)
        outcome = await self._read(record)
        if not isinstance(outcome, Waiting):
            self._delivered.add(ticket)
        return outcome

    async def _read(self, record: OperationRecord) -> Outcome:
        match record.state:
            case OperationState.DONE:
                result: Result = packing.unpack(await contents.result_of(self._blobs, record))
                return Done(result=result)
            case OperationState.FAILED:
                failure = Failure(
                    kind=record.error_kind or "ServiceFault", message=record.error_message or ""
                )
                return Failed(error=failure.error())
            case _:
                return Waiting()


def _unknown(ticket: TicketId) -> NotFound:
    return NotFound(f"There is no request {ticket!r}; results are kept for a limited time.")
