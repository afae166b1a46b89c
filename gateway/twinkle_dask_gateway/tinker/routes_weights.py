"""Saving and loading. In a run's order these count like steps."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import RunId, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.tinker import codec, replies, wire
from twinkle_dask_gateway.tinker.addresses import parse_address
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.reading import check, read, read_object
from twinkle_dask_gateway.tinker.submitting import submitting

routes = APIRouter(route_class=TinkerRoute)


@routes.post("/save_weights")
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


@routes.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Freeze a run's weights for sampling: under a name, or as a new sampler.

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
            ttl_s=body.ttl_seconds,
            user_metadata=body.user_metadata or {},
        )
    return promise(ticket)


@routes.post("/load_weights")
async def load_weights(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Put a checkpoint into a run, or make a run of it."""
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.LoadWeights, content)
        address = parse_address(body.path)
        if body.model_id is not None and body.session_id is None:
            ticket = await service.training.load_state(
                tenant,
                RunId(body.model_id),
                seq=body.seq_id,
                address=address,
                with_optimizer=body.optimizer,
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
            )
        else:
            raise InvalidRequest("Give either model_id, or session_id and model_seq_id.")
    return promise(ticket)


@routes.post("/weights_info")
async def weights_info(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.WeightsInfo:
    """The shape of a checkpoint's adapter."""
    body = await read(request, wire.WeightsQuery)
    info = await service.checkpoints.info(tenant, parse_address(body.tinker_path))
    return codec.weights_info(info)
