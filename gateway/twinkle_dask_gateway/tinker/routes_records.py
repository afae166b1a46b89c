"""What exists: runs. Their ids hold ':', which is no separator in a path."""

from fastapi import APIRouter

from twinkle_dask.types import RunId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.tinker import codec, replies
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.paging import AccessScope, Limit, Offset

routes = APIRouter(route_class=TinkerRoute)


@routes.get("/training_runs")
async def list_training_runs(
    service: ServiceDep,
    tenant: TenantDep,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: str | None = None,
    access_scope: AccessScope = "owned",
) -> replies.TrainingRuns:
    """The tenant's runs; if ``accessible``, also others' that have a published checkpoint."""
    page = await service.runs.page(
        tenant, limit, offset, project=project_id, accessible=access_scope == "accessible"
    )
    return replies.TrainingRuns(
        training_runs=[codec.training_run(run) for run in page.items], cursor=codec.cursor(page)
    )


@routes.get("/training_runs/{run}")
async def get_training_run(
    run: str, service: ServiceDep, tenant: TenantDep, access_scope: AccessScope = "owned"
) -> replies.TrainingRun:
    """One run."""
    accessible = access_scope == "accessible"
    return codec.training_run(await service.runs.info(tenant, RunId(run), accessible=accessible))
