"""Data sets, data loaders and processors."""

from fastapi import APIRouter, HTTPException, Request, Response

from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import Answers, gives, takes
from twinkle_dask_gateway.twinkle.calls import SessionDep, read
from twinkle_dask_gateway.twinkle.errors import EXHAUSTED, TwinkleRoute
from twinkle_dask_gateway.twinkle.replies.processors import ProcessorCalled, ProcessorCreated
from twinkle_dask_gateway.twinkle.wire.processors import ProcessorCall, ProcessorCreate

routes = APIRouter(route_class=TwinkleRoute, prefix="/processor/twinkle")


@routes.post("/create", openapi_extra=takes(ProcessorCreate))
async def create(
    request: Request, service: ServiceDep, tenant: TenantDep, session: SessionDep
) -> ProcessorCreated:
    """Make a processor in the session; it ends with it."""
    body = await read(request, ProcessorCreate)
    made = await service.processors.create(
        tenant, session, body.processor_type, body.class_type, body.arguments
    )
    return ProcessorCreated(processor_id=made)


_OVER: Answers = {EXHAUSTED: {"description": "The iteration is over, or there is no such row."}}


@routes.post("/call", openapi_extra=takes(ProcessorCall), responses=gives(ProcessorCalled) | _OVER)
async def call(
    request: Request, service: ServiceDep, tenant: TenantDep, _session: SessionDep
) -> Response:
    """Call a function; 410 is the end of an iteration, or an index that is out of range."""
    body = await read(request, ProcessorCall)
    called = await service.processors.call(tenant, body.processor_id, body.function, body.arguments)
    if called.over:
        raise HTTPException(EXHAUSTED, "There is nothing more.")
    return Response(b'{"result":' + called.result + b"}", media_type="application/json")
