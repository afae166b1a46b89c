"""The service itself, and sessions."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import SessionEnded
from twinkle_dask.types import SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import read
from twinkle_dask_gateway.tinker import replies, wire
from twinkle_dask_gateway.tinker.answers import json_answer
from twinkle_dask_gateway.tinker.errors import TinkerRoute, error_response

open_routes = APIRouter(route_class=TinkerRoute)
routes = APIRouter(route_class=TinkerRoute)


@open_routes.get("/healthz")
async def healthz() -> replies.Status:
    """For load balancers, which have no key."""
    return replies.Status(status="ok")


@routes.post("/client/config")
async def client_config(config: ConfigDep) -> replies.ClientConfig:
    """The first thing every client asks, with its raw key."""
    return replies.ClientConfig(
        pjwt_auth_enabled=config.tokens,
        proto_compress_fwdbwd=config.compress_forward_backward,
        custom_loss_server_side=config.custom_losses,
        sample_use_retrieve_futures=config.multiplex_polls,
    )


@routes.post("/client/dynamic_config")
async def dynamic_config() -> replies.DynamicConfig:
    """Asked again every few minutes."""
    return replies.DynamicConfig()


@routes.get("/get_server_capabilities")
async def get_server_capabilities(service: ServiceDep) -> replies.Capabilities:
    """The base models."""
    return replies.Capabilities(
        supported_models=[
            replies.SupportedModel(
                model_name=model.name,
                max_context_length=model.facts.context_length,
                sampleable=model.facts.why_not_sampled is None,
            )
            for model in service.catalogue.all()
        ]
    )


@routes.post("/telemetry", openapi_extra=takes(required=False))
async def telemetry(request: Request) -> replies.Status:
    """Taken and dropped, and fast: clients wait for it before they raise any error."""
    await request.body()
    return replies.Status(status="accepted")


@routes.post("/create_session", openapi_extra=takes(wire.CreateSession))
async def create_session(
    request: Request, service: ServiceDep, tenant: TenantDep, config: ConfigDep
) -> replies.SessionCreated:
    """Open a session; the client numbers nothing here, so its idempotency key tells a repeat."""
    body = await read(request, wire.CreateSession)
    session = await service.sessions.create(
        tenant,
        tags=tuple(body.tags or ()),
        user_metadata=body.user_metadata or {},
        display_name=body.display_name,
        project_id=body.project_id,
        sdk_version=body.sdk_version,
        idempotency_key=request.headers.get("x-idempotency-key"),
    )
    return replies.SessionCreated(
        session_id=session,
        info_message=config.info_message,
        warning_message=config.warning_message,
        error_message=config.error_message,
    )


@routes.post(
    "/session_heartbeat",
    openapi_extra=takes(wire.Heartbeat),
    responses=gives(replies.HeartbeatTaken, also={410: replies.Failure}),
)
async def session_heartbeat(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Keep a session alive. 410 ends the client's loop quietly."""
    body = await read(request, wire.Heartbeat)
    try:
        await service.sessions.active(tenant, SessionId(body.session_id))
    except SessionEnded as error:
        return error_response(error, status=410)
    return json_answer({"type": "session_heartbeat"})


@routes.post("/sessions/{session}/finish", openapi_extra=takes(wire.FinishSession))
async def finish_session(
    session: str, request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """The client is done with the session."""
    body = await read(request, wire.FinishSession)
    await service.finish_session(
        tenant, SessionId(session), reason=body.reason.type, detail=body.detail
    )
    return replies.Empty()
