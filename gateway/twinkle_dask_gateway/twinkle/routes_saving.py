"""Saving, loading and uploading of an adapter."""

from typing import Final

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import InvalidRequest
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.twinkle import codec_runs as codec
from twinkle_dask_gateway.twinkle.calls import ModelDep, SessionDep, nothing, read, write
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute
from twinkle_dask_gateway.twinkle.openapi import VOID
from twinkle_dask_gateway.twinkle.replies import runs as replies
from twinkle_dask_gateway.twinkle.wire import saving as wire

routes = APIRouter(route_class=TwinkleRoute)

_MODEL: Final = "/model/{model_id:path}/twinkle"


@routes.post(
    f"{_MODEL}/save",
    openapi_extra=takes(wire.SaveAdapter),
    responses=gives(replies.AdapterSaved),
)
async def twinkle_save(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
) -> Response:
    """Save an adapter under a name, or its weights for sampling under a new one each time."""
    body = await read(request, wire.SaveAdapter)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    if body.is_sampler:
        kept = await service.saving.save_for_sampler(
            tenant,
            adapter.run,
            name=body.name,
            consumed_samples=body.consumed_train_samples,
            interval=body.interval,
        )
    else:
        kept = await service.saving.save(
            tenant,
            adapter.run,
            name=body.name,
            optimizer=body.save_optimizer,
            consumed_samples=body.consumed_train_samples,
            interval=body.interval,
        )
    if kept is None:
        return write(replies.AdapterSaved(twinkle_path="", checkpoint_dir=None))
    return write(
        replies.AdapterSaved(
            twinkle_path=codec.format_address(kept.address), checkpoint_dir=kept.place
        )
    )


@routes.post(f"{_MODEL}/load", openapi_extra=takes(wire.LoadAdapter), responses=VOID)
async def twinkle_load(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
) -> Response:
    """Set an adapter to a checkpoint, with its optimizer if that is wanted and was saved."""
    body = await read(request, wire.LoadAdapter)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    source = codec.source_of(body.name)
    await service.saving.load(tenant, adapter.run, source, optimizer=body.load_optimizer)
    return nothing()


@routes.post(
    f"{_MODEL}/resume_from_checkpoint",
    openapi_extra=takes(wire.ResumeAdapter),
    responses=gives(replies.AdapterResumed),
)
async def twinkle_resume(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
) -> Response:
    """Go on from a checkpoint: with everything that was saved, or with the weights alone."""
    body = await read(request, wire.ResumeAdapter)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    place = await service.saving.load(
        tenant,
        adapter.run,
        codec.source_of(body.name),
        optimizer=not body.resume_only_model,
    )
    return write(
        replies.AdapterResumed(
            result=replies.Progress(
                cur_step=place.progress.gradients,
                consumed_train_samples=place.consumed_samples,
                gradient_accumulation_steps=place.accumulation,
            )
        )
    )


@routes.post(
    f"{_MODEL}/upload_to_hub",
    openapi_extra=takes(wire.UploadAdapter),
    responses=gives(replies.UploadStarted),
)
async def twinkle_upload(
    request: Request, _model: ModelDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Begin to send a checkpoint's adapter files elsewhere; it goes on by itself."""
    body = await read(request, wire.UploadAdapter)
    told = body.checkpoint_dir
    if not isinstance(told, str):
        # What a save answered.
        told = told.get("twinkle_path") or told.get("checkpoint_dir")
        if not isinstance(told, str):
            raise InvalidRequest("checkpoint_dir must be a twinkle:// address, or a save's answer.")
    address = await service.saving.address(tenant, codec.source_of(told))
    upload = await service.uploads.start(
        tenant, address, name=body.hub_model_id, token=body.hub_token
    )
    return write(replies.UploadStarted(request_id=upload.id))


@routes.get(f"{_MODEL}/upload_status/{{request_id}}")
async def twinkle_upload_status(
    request_id: str, _model: ModelDep, service: ServiceDep, tenant: TenantDep
) -> replies.UploadStatus:
    """How an upload stands."""
    upload = await service.uploads.status(tenant, request_id)
    return replies.UploadStatus(request_id=upload.id, status=str(upload.state), error=upload.error)
