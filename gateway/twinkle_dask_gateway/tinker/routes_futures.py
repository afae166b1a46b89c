"""Results to come. A poll is held until there is one, because the client polls again at once."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.operations.values import Done, Failed, QueueState, Waiting
from twinkle_dask.types import TicketId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, PollsDep, ServiceDep
from twinkle_dask_gateway.tinker import answers, replies, wire
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.reading import read

routes = APIRouter(route_class=TinkerRoute)


@routes.post("/retrieve_future")
async def retrieve_future(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
    polls: PollsDep,
) -> Response:
    """Wait for a result. It stays retrievable: an answer may get lost on its way."""
    body = await read(request, wire.TicketQuery)
    wait = service.outcome(tenant, TicketId(body.request_id), timeout_s=config.poll_s)
    match await polls.wait(request, wait):
        case Done() as outcome:
            return await answers.done(outcome, request, config)
        case Failed() as outcome:
            return answers.failed(outcome)
        case Waiting() as outcome:
            return answers.not_yet(outcome)
        case None:
            return answers.not_yet(Waiting(queue_state=QueueState.ACTIVE, reason=None))


@routes.post("/cancel_future")
async def cancel_future(request: Request, service: ServiceDep, tenant: TenantDep) -> replies.Empty:
    """The client no longer wants a sample."""
    body = await read(request, wire.TicketQuery)
    await service.sampling.cancel(tenant, TicketId(body.request_id))
    return replies.Empty()
