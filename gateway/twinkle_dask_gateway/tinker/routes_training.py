"""Runs and their steps. Everything here but ``get_info`` answers with a promise."""

import asyncio

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import Tenant
from twinkle_dask.types import CustomLoss, ForwardBackward, RunId, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import (
    aside,
    check,
    is_protobuf,
    let_go,
    read,
    read_bytes,
    read_object,
)
from twinkle_dask_gateway.tinker import (
    codec,
    codec_json,
    codec_proto,
    codec_spans,
    replies,
    tinker_pb2,
    wire,
)
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.submitting import submitting
from twinkle_dask_gateway.tinker.tensors import Growth

routes = APIRouter(route_class=TinkerRoute)


@routes.post(
    "/forward_backward",
    openapi_extra=takes(wire.ForwardBackward, protobuf="ForwardBackwardRequest"),
    responses=gives(replies.Promise),
)
async def forward_backward(
    request: Request, service: ServiceDep, tenant: TenantDep, config: ConfigDep
) -> Response:
    """A batch, with its gradient or forward only. Old clients send JSON."""
    if not is_protobuf(request):
        return await _json_batch(request, service, tenant, config, wire.ForwardBackward)
    growth = Growth(config.max_decoded_bytes)
    async with submitting(service, tenant) as place:
        content = await read_bytes(request)
        size = len(content)

        def parse() -> tinker_pb2.ForwardBackwardRequest:
            return codec_proto.parse_forward_backward(content, max_data=config.max_data)

        message = await aside(size, config, parse)
        place.at(message.model_id, message.seq_id)
        if message.seq_id < 0:
            raise InvalidRequest(f"seq_id must not be negative, but is {message.seq_id}.")
        custom = await _custom(service, tenant, message.model_id, codec_proto.loss_id_of(message))
        batch = await aside(size, config, lambda: codec_proto.batch_of(message, growth, custom))
        spans = await aside(size, config, lambda: codec_spans.spans_of(message))
        ticket = await service.training.forward_backward(
            tenant, RunId(message.model_id), seq=message.seq_id, batch=batch, spans=spans
        )
    return promise(ticket)


@routes.post("/optim_step", openapi_extra=takes(wire.OptimStep), responses=gives(replies.Promise))
async def optim_step(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Spend the gradient."""
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)
        body = check(wire.OptimStep, content)
        ticket = await service.training.optim_step(
            tenant, RunId(body.model_id), seq=body.seq_id, adam=codec_json.adam_of(body.adam_params)
        )
    return promise(ticket)


@routes.post("/forward", openapi_extra=takes(wire.Forward), responses=gives(replies.Promise))
async def forward(
    request: Request, service: ServiceDep, tenant: TenantDep, config: ConfigDep
) -> Response:
    """A forward pass from SDKs before 0.25."""
    return await _json_batch(request, service, tenant, config, wire.Forward)


@routes.post(
    "/create_model",
    openapi_extra=takes(wire.CreateModel),
    responses=gives(replies.Promise),
)
async def create_model(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Start a run; its id is ``<session>:train:<model_seq_id>``, which clients compute too."""
    body = await read(request, wire.CreateModel)
    ticket = await service.runs.create(
        tenant,
        SessionId(body.session_id),
        seq=body.model_seq_id,
        base_model=body.base_model,
        lora=codec.lora_of(body.lora_config),
        user_metadata=body.user_metadata or {},
    )
    return promise(ticket)


@routes.post("/get_info", openapi_extra=takes(wire.ModelQuery))
async def get_info(request: Request, service: ServiceDep, tenant: TenantDep) -> replies.ModelInfo:
    """What a run is; answered as soon as the promise of ``create_model`` is fulfilled."""
    body = await read(request, wire.ModelQuery)
    return codec.model_info(await service.runs.info(tenant, RunId(body.model_id)))


async def _custom(
    service: Service, tenant: Tenant, run: str, loss: str | None
) -> CustomLoss | None:
    return None if loss is None else await service.custom_losses.get(tenant, RunId(run), loss)


async def _json_batch(
    request: Request,
    service: Service,
    tenant: Tenant,
    config: GatewayConfig,
    model: type[wire.ForwardBackward] | type[wire.Forward],
) -> Response:
    async with submitting(service, tenant) as place:
        content = await read_object(request)
        place.of(content)

        body = await asyncio.to_thread(check, model, content, max_data=config.max_data)
        loss = codec_json.loss_id_of(body.batch)
        custom = await _custom(service, tenant, body.model_id, loss)

        def decode() -> ForwardBackward:
            growth = Growth(config.max_decoded_bytes)
            try:
                return codec_json.batch_of(
                    body.batch, backward=body.backward, growth=growth, custom=custom
                )
            finally:
                let_go(content, body.batch.data)

        batch = await asyncio.to_thread(decode)
        ticket = await service.training.forward_backward(
            tenant, RunId(body.model_id), seq=body.seq_id, batch=batch
        )
    return promise(ticket)
