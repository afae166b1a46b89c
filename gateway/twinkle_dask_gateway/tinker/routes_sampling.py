"""Samplers and what is drawn from them. Samples have no order among each other."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.types import SamplerId, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import aside, read, size_of
from twinkle_dask_gateway.tinker import codec, codec_sampling, replies, wire
from twinkle_dask_gateway.tinker.addresses import parse_address
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute

routes = APIRouter(route_class=TinkerRoute)


@routes.post("/asample", openapi_extra=takes(wire.Sample), responses=gives(replies.Promise))
async def asample(
    request: Request, service: ServiceDep, tenant: TenantDep, config: ConfigDep
) -> Response:
    """Draw continuations of a prompt."""
    body = await read(request, wire.Sample)
    asked = await aside(
        await size_of(request), config, lambda: codec_sampling.sample_request_of(body)
    )
    ticket = await service.sampling.sample(
        tenant,
        SamplerId(body.sampling_session_id),
        seq=body.seq_id,
        request=asked,
    )
    return promise(ticket)


@routes.post("/create_sampling_session", openapi_extra=takes(wire.CreateSamplingSession))
async def create_sampling_session(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.SamplingSessionCreated:
    """A sampler over a base model or a checkpoint; the checkpoint wins where both are named."""
    body = await read(request, wire.CreateSamplingSession)
    sampler = await service.samplers.create(
        tenant,
        SessionId(body.session_id),
        seq=body.sampling_session_seq_id,
        base_model=body.base_model,
        address=parse_address(body.model_path) if body.model_path else None,
    )
    return replies.SamplingSessionCreated(sampling_session_id=sampler.sampler)


@routes.post("/join_sampling_session", openapi_extra=takes(wire.JoinSamplingSession))
async def join_sampling_session(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.SamplingSessionJoined:
    """A number for a copy of a sampling client, so that its samples are told apart."""
    body = await read(request, wire.JoinSamplingSession)
    number = await service.samplers.join(tenant, SamplerId(body.sampling_session_id))
    return replies.SamplingSessionJoined(client_counter=number)


@routes.get("/samplers/{sampler}")
async def get_sampler(sampler: str, service: ServiceDep, tenant: TenantDep) -> replies.Sampler:
    """What a sampler samples from."""
    return codec.sampler(await service.samplers.info(tenant, SamplerId(sampler)))
