"""Samplers and what is drawn from them. Samples have no order among each other."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.types import SamplerId, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.tinker import codec, codec_json, replies, wire
from twinkle_dask_gateway.tinker.addresses import parse_address
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.reading import read

routes = APIRouter(route_class=TinkerRoute)


@routes.post("/asample")
async def asample(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Draw continuations of a prompt."""
    body = await read(request, wire.Sample)
    ticket = await service.sampling.sample(
        tenant,
        SamplerId(body.sampling_session_id),
        seq=body.seq_id,
        request=codec_json.sample_request_of(body),
    )
    return promise(ticket)


@routes.post("/create_sampling_session")
async def create_sampling_session(
    request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.SamplingSessionCreated:
    """A sampler over a base model or a checkpoint; the checkpoint wins where both are named."""
    body = await read(request, wire.CreateSamplingSession)
    sampler = await service.sampling.create(
        tenant,
        SessionId(body.session_id),
        seq=body.sampling_session_seq_id,
        base_model=body.base_model,
        address=parse_address(body.model_path) if body.model_path else None,
    )
    return replies.SamplingSessionCreated(sampling_session_id=sampler.sampler)


@routes.get("/samplers/{sampler}")
async def get_sampler(sampler: str, service: ServiceDep, tenant: TenantDep) -> replies.Sampler:
    """What a sampler samples from."""
    return codec.sampler(await service.sampling.info(tenant, SamplerId(sampler)))
