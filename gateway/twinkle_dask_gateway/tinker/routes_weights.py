"""Saving and loading. In a run's order these count like steps."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import RunId, SessionId
from twinkle_dask_gateway.auth import CredentialsDep, TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import check, read, read_object
from twinkle_dask_gateway.tinker import codec, replies, wire
from twinkle_dask_gateway.tinker.addresses import parse_address
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.readers import reader_of
from twinkle_dask_gateway.tinker.submitting import submitting

routes = APIRouter(route_class=TinkerRoute)


@routes.post(
    "/save_weights",
    openapi_extra=takes(wire.SaveWeights),
    responses=gives(replies.Promise),
)
async def save_weights(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Keep a run's training state under a name."""
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.SaveWeights, content)
        ticket = await service.training.save_state(
            tenant,
            RunId(body.model_id),
            seq=body.seq_id,
            name=body.path,
            overwrite=body.overwrite,
            ttl_s=body.ttl_seconds,
            user_metadata=body.user_metadata or {},
        )
    return promise(ticket)


@routes.post(
    "/save_weights_for_sampler",
    openapi_extra=takes(wire.SaveWeightsForSampler),
    responses=gives(replies.Promise),
)
async def save_weights_for_sampler(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Freeze a run's weights for sampling: under a name, or as a new sampler.

    Samplers of ``kind`` inflight share the newest weights that their run saved so.

    A client that repeats a lost submit keeps ``seq_id`` but takes the next
    ``sampling_session_seq_id``; the first of them is what counts.
    """
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.SaveWeightsForSampler, content)
        ticket = await service.training.save_for_sampler(
            tenant,
            RunId(body.model_id),
            seq=body.seq_id,
            name=body.path,
            sampler_seq=body.sampling_session_seq_id,
            inflight=body.kind == "inflight",
            ttl_s=body.ttl_seconds,
            user_metadata=body.user_metadata or {},
        )
    return promise(ticket)


@routes.post(
    "/save_weights_external",
    openapi_extra=takes(wire.SaveWeightsExternal),
    responses=gives(replies.Promise),
)
async def save_weights_external(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Export a run's adapter under a name, for other programs."""
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.SaveWeightsExternal, content)
        ticket = await service.training.save_external(
            tenant,
            RunId(body.model_id),
            seq=body.seq_id,
            name=body.path,
            ttl_s=body.ttl_seconds,
            recipients=tuple(body.age_encryption_recipients or ()),
        )
    return promise(ticket)


@routes.post(
    "/load_weights",
    openapi_extra=takes(wire.LoadWeights),
    responses=gives(replies.Promise),
)
async def load_weights(
    request: Request, service: ServiceDep, tenant: TenantDep, credentials: CredentialsDep
) -> Response:
    """Put a checkpoint into a run, or make a run of it."""
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.LoadWeights, content)
        address = parse_address(body.path)
        reader = await reader_of(tenant, body.weights_access_token, credentials)
        if body.model_id is not None and body.session_id is None:
            ticket = await service.training.load_state(
                tenant,
                RunId(body.model_id),
                seq=body.seq_id,
                address=address,
                with_optimizer=body.optimizer,
                reader=reader,
            )
        elif body.model_id is None and body.session_id and body.model_seq_id is not None:
            ticket = await service.runs.create_from(
                tenant,
                SessionId(body.session_id),
                seq=body.model_seq_id,
                address=address,
                with_optimizer=body.optimizer,
                base_model=body.base_model,
                user_metadata=body.user_metadata or {},
                reader=reader,
            )
        else:
            raise InvalidRequest("Give either model_id, or session_id and model_seq_id.")
    return promise(ticket)


@routes.post(
    "/unload_model",
    openapi_extra=takes(wire.ModelQuery),
    responses=gives(replies.Promise),
)
async def unload_model(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Free a run, once what was submitted before is done. Older clients say so; it has no number.

    A repeat gives the first promise again; any other work is refused from now on.
    """
    body = await read(request, wire.ModelQuery)
    return promise(await service.runs.unload(tenant, RunId(body.model_id)))


@routes.post("/weights_info", openapi_extra=takes(wire.WeightsQuery))
async def weights_info(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.WeightsInfo:
    """The shape of a checkpoint's adapter."""
    body = await read(request, wire.WeightsQuery)
    info = await service.checkpoints.info(tenant, parse_address(body.tinker_path))
    return codec.weights_info(info)
