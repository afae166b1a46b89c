"""Training runs and their checkpoints."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from twinkle_dask.errors import NotPermitted
from twinkle_dask.types import RunId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.twinkle import codec_runs as codec
from twinkle_dask_gateway.twinkle.calls import read, write
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute
from twinkle_dask_gateway.twinkle.replies import runs as replies
from twinkle_dask_gateway.twinkle.wire import saving as wire

routes = APIRouter(route_class=TwinkleRoute)

_Limit = Annotated[int, Query(ge=1, le=1000)]
_Offset = Annotated[int, Query(ge=0, lt=2**31)]


@routes.get("/twinkle/training_runs")
async def twinkle_training_runs(
    service: ServiceDep,
    tenant: TenantDep,
    limit: _Limit = 20,
    offset: _Offset = 0,
    all_users: bool = False,
) -> replies.KeptRuns:
    """The tenant's runs, newest first; nobody may ask for those of all tenants."""
    if all_users:
        raise NotPermitted("Runs of other tenants are not listed; leave all_users out.")
    page = await service.runs.page(tenant, limit, offset)
    dirs = await service.saving.save_dirs(tenant, [info.run for info in page.items])
    return replies.KeptRuns(
        training_runs=[codec.run(info, dirs.get(info.run)) for info in page.items],
        cursor=replies.RunCursor(limit=page.limit, offset=page.offset, total_count=page.total),
    )


@routes.get("/twinkle/training_runs/{run_id}")
async def twinkle_training_run(
    run_id: str, service: ServiceDep, tenant: TenantDep
) -> replies.KeptRun:
    """One run of the tenant's."""
    info = await service.runs.info(tenant, RunId(run_id))
    dirs = await service.saving.save_dirs(tenant, [info.run])
    return codec.run(info, dirs.get(info.run))


@routes.get("/twinkle/training_runs/{run_id}/checkpoints")
async def twinkle_checkpoints(
    run_id: str, service: ServiceDep, tenant: TenantDep
) -> replies.KeptCheckpoints:
    """A run's checkpoints, oldest first; of another tenant's run those that are public."""
    found = await service.checkpoints.of_run(tenant, RunId(run_id), exports=False)
    return replies.KeptCheckpoints(checkpoints=[codec.checkpoint(info) for info in found])


@routes.delete("/twinkle/training_runs/{run_id}/checkpoints/{checkpoint_id:path}")
async def twinkle_delete_checkpoint(
    run_id: str, checkpoint_id: str, service: ServiceDep, tenant: TenantDep
) -> replies.CheckpointRemoved:
    """Remove a checkpoint for good. What was written below ``save_dir`` is the tenant's own."""
    await service.checkpoints.delete(tenant, codec.address_of(run_id, checkpoint_id))
    return replies.CheckpointRemoved(success=True, message=f"Removed {checkpoint_id}.")


@routes.get("/twinkle/checkpoint_path/{run_id}/{checkpoint_id:path}")
async def twinkle_checkpoint_path(
    run_id: str, checkpoint_id: str, service: ServiceDep, tenant: TenantDep
) -> replies.CheckpointPlace:
    """Where the files of a checkpoint of the tenant's own are."""
    address = codec.address_of(run_id, checkpoint_id)
    return replies.CheckpointPlace(
        path=await service.saving.place_of(tenant, address),
        twinkle_path=codec.format_address(address),
    )


@routes.post(
    "/twinkle/weights_info",
    openapi_extra=takes(wire.AskWeights),
    responses=gives(replies.WeightsShape),
)
async def twinkle_weights_info(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Whose weights an address names, and their shape."""
    body = await read(request, wire.AskWeights)
    source = codec.source_of(body.twinkle_path)
    info = await service.checkpoints.info(tenant, await service.saving.address(tenant, source))
    return write(
        replies.WeightsShape(
            training_run_id=info.address.run,
            base_model=info.base_model,
            model_owner=tenant.name if info.tenant == tenant.id else "another tenant",
            is_lora=True,
            lora_rank=info.spec.rank,
        )
    )
