"""The gateway itself, and sessions."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import SessionEnded
from twinkle_dask.types import SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.twinkle.calls import ModelDep, read, write
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute, error_response
from twinkle_dask_gateway.twinkle.replies import base
from twinkle_dask_gateway.twinkle.replies import service as replies
from twinkle_dask_gateway.twinkle.wire import sessions as wire

routes = APIRouter(route_class=TwinkleRoute)
open_routes = APIRouter(route_class=TwinkleRoute)


@open_routes.get("/twinkle/healthz")
async def twinkle_healthz() -> base.Fine:
    """For load balancers, which have no key."""
    return base.Fine()


@routes.get("/twinkle/healthz/deep", responses=gives(also={503: replies.DeepHealth}))
async def twinkle_deep_health(service: ServiceDep, response: Response) -> replies.DeepHealth:
    """Whether every base model has a host at the moment; else 503 with the same body."""
    models: dict[str, replies.ModelHealth] = {}
    for model in service.catalogue.all():
        why = service.why_not_up(model)
        models[model.name] = replies.ModelHealth(
            healthy=why is None, status_code=503 if why else 200
        )
    healthy = all(model.healthy for model in models.values())
    response.status_code = 200 if healthy else 503
    return replies.DeepHealth(healthy=healthy, models=models)


@routes.get("/model/{model_id:path}/healthz", responses=gives(also={503: replies.OneModelHealth}))
async def twinkle_model_health(
    model: ModelDep, service: ServiceDep, response: Response
) -> replies.OneModelHealth:
    """Whether a base model has a host at the moment; else 503 with the same body."""
    why = service.why_not_up(model)
    response.status_code = 503 if why else 200
    return replies.OneModelHealth(healthy=why is None, detail=why or "Its hosts are up.")


@routes.get("/twinkle/get_server_capabilities")
async def twinkle_capabilities(service: ServiceDep) -> replies.ServedNames:
    """The base models."""
    return replies.ServedNames(
        supported_models=[
            replies.ServedName(model_name=model.name) for model in service.catalogue.all()
        ]
    )


@routes.get("/twinkle/capacity_info")
async def twinkle_capacity(service: ServiceDep, tenant: TenantDep) -> replies.Capacity:
    """How many adapters the tenant may still add; there are no slots that tenants share."""
    held = service.runs.held(tenant)
    return replies.Capacity(
        max_loras=held.limit, used_loras=held.used, free_loras=max(0, held.limit - held.used)
    )


@routes.get("/twinkle/status")
async def twinkle_status(service: ServiceDep, tenant: TenantDep) -> replies.ServiceStatus:
    """What the tenant has that is alive, and after how long a silent session ends."""
    return replies.ServiceStatus(
        resources=replies.ResourceCounts(
            sessions=service.sessions.num_active(tenant.id),
            models=service.runs.held(tenant).used,
            sampling_sessions=await service.samplers.num_active(tenant),
            futures=service.tickets.num_pending(tenant.id),
        ),
        cleanup=replies.CleanUp(expiration_timeout=service.config.limits.session_timeout_s),
    )


@routes.post(
    "/twinkle/create_session",
    openapi_extra=takes(wire.OpenSession),
    responses=gives(replies.SessionOpened),
)
async def twinkle_create_session(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Open a session, which adapters, samplers and processors live in."""
    body = await read(request, wire.OpenSession)
    session = await service.sessions.create(
        tenant,
        tags=(),
        user_metadata=body.metadata or {},
        display_name=None,
        project_id=None,
        sdk_version="twinkle",
        idempotency_key=None,
    )
    return write(replies.SessionOpened(session_id=session))


@routes.post(
    "/twinkle/session_heartbeat",
    openapi_extra=takes(wire.Beat),
    responses=gives(replies.Beaten),
)
async def twinkle_session_heartbeat(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """The session's client is alive. Once the session is over: 404, and nothing brings it back."""
    body = await read(request, wire.Beat)
    try:
        await service.sessions.active(tenant, SessionId(body.session_id))
    except SessionEnded as error:
        return error_response(error, 404)
    return write(replies.Beaten())
