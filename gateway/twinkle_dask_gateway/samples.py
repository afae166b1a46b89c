"""Samples for whoever waits with an open request, which a client may leave."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twinkle_dask.errors import ServiceFault
from twinkle_dask.operations.following import Following
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import Failed, Tenant, Ticket, Waiting
from twinkle_dask.types import SamplePart, SampleRequest, SampleResult, SamplerId
from twinkle_dask_gateway.polls import Polls

_WAIT_S = 60.0


async def result_of(service: Service, tenant: Tenant, ticket: Ticket) -> SampleResult:
    """Wait for a sample however long it takes.

    Raises:
        TwinkleDaskError: What became of it instead.
    """
    while True:
        outcome = await service.outcome(tenant, ticket.id, timeout_s=_WAIT_S)
        if isinstance(outcome, Failed):
            raise outcome.error
        if not isinstance(outcome, Waiting):
            if not isinstance(outcome.result, SampleResult):
                raise ServiceFault(f"A sample became {type(outcome.result).__name__}.")
            return outcome.result


async def draw_all(
    http: Request,
    polls: Polls,
    service: Service,
    tenant: Tenant,
    sampler: SamplerId,
    requests: Sequence[SampleRequest],
) -> list[SampleResult]:
    """Draw all of these at the same time; results in order.

    Where one fails, or the client leaves, the others are cancelled.

    Raises:
        TwinkleDaskError: What became of the first that failed.
        ClientDisconnect: The client left.
        Saturated: The server is stopping.
    """
    return await polls.answer(http, _draw_all(service, tenant, sampler, requests))


async def _draw_all(
    service: Service, tenant: Tenant, sampler: SamplerId, requests: Sequence[SampleRequest]
) -> list[SampleResult]:
    tickets: list[Ticket] = []
    try:
        for request in requests:
            ticket = await service.sampling.sample(tenant, sampler, seq=None, request=request)
            tickets.append(ticket)
        return await asyncio.gather(*(result_of(service, tenant, ticket) for ticket in tickets))
    except BaseException:
        await asyncio.gather(*(service.sampling.cancel(tenant, one.id) for one in tickets))
        raise


@dataclass(frozen=True, slots=True)
class Followed:
    """A sample that is being drawn."""

    service: Service
    tenant: Tenant
    ticket: Ticket
    following: Following

    def parts(self) -> AsyncGenerator[SamplePart]:
        """What is drawn, as it comes."""
        return self.following.parts()

    async def result(self) -> SampleResult:
        """The outcome, which is there once the parts have ended.

        Raises:
            TwinkleDaskError: What became of it instead.
        """
        return await result_of(self.service, self.tenant, self.ticket)


@asynccontextmanager
async def followed(
    service: Service, tenant: Tenant, sampler: SamplerId, request: SampleRequest
) -> AsyncGenerator[Followed]:
    """Draw for the length of a block; what is not done at its end is cancelled."""
    ticket, following = await service.sampling.follow(tenant, sampler, request)
    try:
        yield Followed(service, tenant, ticket, following)
    finally:
        # A client that has left ends the block by a cancellation, which would end this as well.
        cancelling = asyncio.ensure_future(service.sampling.cancel(tenant, ticket.id))
        await asyncio.shield(cancelling)


class DrawnStream(StreamingResponse):
    """An answer that tells a sample as it is drawn.

    The block that draws it is left with the answer, also where the client was gone before the
    first piece was asked for: a generator that never began could not end it.
    """

    def __init__(
        self,
        stack: AsyncExitStack,
        pieces: AsyncGenerator[bytes],
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(pieces, headers=headers, media_type=media_type)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell it."""
        async with self._stack:
            await super().__call__(scope, receive, send)
