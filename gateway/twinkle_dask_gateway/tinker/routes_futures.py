"""Results to come. A poll is held until there is one, because the client polls again at once."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.operations.events import Clone, Completions
from twinkle_dask.operations.values import Done, Failed, QueueState, Waiting
from twinkle_dask.types import SamplerId, TicketId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, PollsDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.polls import spread
from twinkle_dask_gateway.reading import read
from twinkle_dask_gateway.tinker import answers, codec, replies, wire
from twinkle_dask_gateway.tinker.errors import TinkerRoute

routes = APIRouter(route_class=TinkerRoute)


@routes.post(
    "/retrieve_future",
    openapi_extra=takes(wire.RetrieveFuture),
    responses=gives(
        *replies.RESULTS,
        protobuf=("ForwardBackwardOutput", "SampleResponse"),
        also={408: replies.TryAgain},
    ),
)
async def retrieve_future(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
    polls: PollsDep,
) -> Response:
    """Wait for a result. It stays retrievable: an answer may get lost on its way."""
    body = await read(request, wire.RetrieveFuture)
    wait = service.outcome(tenant, TicketId(body.request_id), timeout_s=spread(config.poll_s))
    match await polls.wait(request, wait):
        case Done() as outcome:
            size = answers.size_of(outcome)
            if body.allow_metadata_only and size > config.metadata_above_bytes:
                return answers.metadata_only(size)
            return await answers.done(outcome, request, config)
        case Failed() as outcome:
            return answers.failed(outcome)
        case Waiting() as outcome:
            return answers.not_yet(outcome)
        case None:
            return answers.not_yet(Waiting(queue_state=QueueState.ACTIVE, reason=None))


@routes.post("/retrieve_futures", openapi_extra=takes(wire.RetrieveFutures))
async def retrieve_futures(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
    polls: PollsDep,
) -> replies.FutureCompletions:
    """Wait until some requests of a sampling client are done; it fetches each by itself then.

    An event is told in every answer until the client asks from behind it.
    """
    body = await read(request, wire.RetrieveFutures)
    target = body.target
    timeout_s = config.poll_s if body.timeout is None else min(body.timeout, config.poll_s)
    wait = service.sampling.completions(
        tenant,
        Clone(SamplerId(target.sampling_session_id), target.cloned_sampler_id),
        after=body.prev_cursor,
        retrieved=tuple(TicketId(ticket) for ticket in body.retrieved_request_ids),
        timeout_s=timeout_s,
    )
    found = await polls.wait(request, wait)
    return codec.completions(found or Completions(items=(), cursor=body.prev_cursor))


@routes.post("/cancel_future", openapi_extra=takes(wire.TicketQuery))
async def cancel_future(request: Request, service: ServiceDep, tenant: TenantDep) -> replies.Empty:
    """The client no longer wants a sample; when this is answered, nobody works on it any more."""
    body = await read(request, wire.TicketQuery)
    await service.sampling.cancel(tenant, TicketId(body.request_id))
    return replies.Empty()
