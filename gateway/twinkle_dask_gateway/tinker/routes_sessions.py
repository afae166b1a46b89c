"""Sessions as records: lists, searches, projects, traces."""

from typing import Final

from fastapi import APIRouter, Request, Response

from twinkle_dask.types import SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep, SignerDep
from twinkle_dask_gateway.openapi import takes
from twinkle_dask_gateway.reading import read
from twinkle_dask_gateway.signing import base_of
from twinkle_dask_gateway.tinker import codec, codec_sessions, replies, wire
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.paging import AccessScope, Limit, Offset

open_routes = APIRouter(route_class=TinkerRoute)
routes = APIRouter(route_class=TinkerRoute)

_TRACES: Final = "/traces"
#: How long the URL of a trace works.
_URL_LIFETIME_S: Final = 3600.0
# `access_scope` makes no difference to sessions: a published checkpoint shows its run to others,
# never the session.


@routes.get("/sessions")
async def list_sessions(
    service: ServiceDep,
    tenant: TenantDep,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> replies.Sessions:
    """The tenant's sessions, newest first."""
    page = await service.sessions.page(tenant, limit, offset)
    return replies.Sessions(sessions=list(page.items))


@routes.get("/sessions/{session}")
async def get_session(
    session: str, service: ServiceDep, tenant: TenantDep, access_scope: AccessScope = "owned"
) -> replies.Session:
    """One session and what was made in it."""
    return codec.session(await service.sessions.info(tenant, SessionId(session)))


@routes.post("/sessions/search", openapi_extra=takes(wire.SearchSessions))
async def search_sessions(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.FoundSessions:
    """The tenant's sessions that a query finds, newest first, page by page."""
    body = await read(request, wire.SearchSessions)
    query = codec_sessions.query_of(body, tenant)
    found = await service.searching.sessions(tenant, query, body.limit)
    return codec_sessions.found_sessions(found)


@routes.put("/sessions/{session}/project", openapi_extra=takes(wire.AssignProject))
async def assign_session_project(
    session: str, request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """Put a session, with all that was made in it, into a project."""
    body = await read(request, wire.AssignProject)
    await service.sessions.assign_project(tenant, SessionId(session), body.project_id)
    return replies.Empty()


@routes.get("/sessions/{session}/trace_export")
async def export_session_trace(
    session: str, request: Request, service: ServiceDep, tenant: TenantDep, signer: SignerDep
) -> replies.TraceExport:
    """Where the session's trace can be fetched without a key. There is nothing to wait for."""
    granted = await service.traces.grant(tenant, SessionId(session))
    path = f"/api/v1{_TRACES}/{granted}"
    return replies.TraceExport(url=signer.sign(base_of(request), path, {}, _URL_LIFETIME_S).url)


@open_routes.get(
    _TRACES + "/{session}",
    response_class=Response,
    responses={
        200: {
            "description": "JSON that Perfetto can draw.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        403: {"description": "The URL was not signed here, or has expired."},
    },
)
async def session_trace(
    session: str, request: Request, service: ServiceDep, signer: SignerDep
) -> Response:
    """A session's trace, for whoever has its URL."""
    signer.check(f"/api/v1{_TRACES}/{session}", request.query_params)
    content = await service.traces.document(SessionId(session))
    name = f'attachment; filename="{session}.pftrace"'
    headers = {"cache-control": "private", "content-disposition": name}
    return Response(content, headers=headers, media_type="application/json")
