"""What exists: runs, checkpoints, sessions. Run ids hold ':', which is no separator in a path."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from twinkle_dask.errors import NotSupported
from twinkle_dask.types import RunId, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.tinker import codec, replies, wire
from twinkle_dask_gateway.tinker.addresses import address_of
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.reading import read

routes = APIRouter(route_class=TinkerRoute)

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]
# `access_scope` (owned, accessible) is not read anywhere: tenants access what they own.


@routes.get("/training_runs")
async def list_training_runs(
    service: ServiceDep,
    tenant: TenantDep,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: str | None = None,
) -> replies.TrainingRuns:
    """The tenant's runs."""
    if project_id:
        raise NotSupported("Runs cannot be listed by project_id yet. Leave it out.")
    page = await service.runs.page(tenant, limit, offset)
    return replies.TrainingRuns(
        training_runs=[codec.training_run(run) for run in page.items], cursor=codec.cursor(page)
    )


@routes.get("/training_runs/{run}")
async def get_training_run(run: str, service: ServiceDep, tenant: TenantDep) -> replies.TrainingRun:
    """One run."""
    return codec.training_run(await service.runs.info(tenant, RunId(run)))


@routes.get("/training_runs/{run}/checkpoints")
async def list_run_checkpoints(
    run: str, service: ServiceDep, tenant: TenantDep
) -> replies.Checkpoints:
    """The checkpoints of one run."""
    found = await service.checkpoints.of_run(tenant, RunId(run))
    return replies.Checkpoints(checkpoints=[codec.checkpoint(info) for info in found])


@routes.delete("/training_runs/{run}/checkpoints/{kind}/{name}")
async def delete_checkpoint(
    run: str, kind: str, name: str, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """Remove a checkpoint for good."""
    await service.checkpoints.delete(tenant, address_of(run, kind, name))
    return replies.Empty()


@routes.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl")
async def set_checkpoint_ttl(
    run: str, kind: str, name: str, request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """Let a checkpoint expire, counted from now, or keep it (null)."""
    body = await read(request, wire.SetTtl)
    address = address_of(run, kind, name)
    await service.checkpoints.set_ttl(tenant, address, body.ttl_seconds)
    return replies.Empty()


@routes.get("/checkpoints")
async def list_checkpoints(
    service: ServiceDep, tenant: TenantDep, limit: Limit = 100, offset: Offset = 0
) -> replies.Checkpoints:
    """The tenant's checkpoints over all runs."""
    page = await service.checkpoints.page(tenant, limit, offset)
    return replies.Checkpoints(
        checkpoints=[codec.checkpoint(info) for info in page.items], cursor=codec.cursor(page)
    )


@routes.get("/sessions")
async def list_sessions(
    service: ServiceDep, tenant: TenantDep, limit: Limit = 20, offset: Offset = 0
) -> replies.Sessions:
    """The tenant's sessions."""
    page = await service.sessions.page(tenant, limit, offset)
    return replies.Sessions(sessions=list(page.items))


@routes.get("/sessions/{session}")
async def get_session(session: str, service: ServiceDep, tenant: TenantDep) -> replies.Session:
    """One session and what was made in it."""
    return codec.session(await service.sessions.info(tenant, SessionId(session)))
