"""Passes, steps and metrics of an adapter."""

import asyncio
from dataclasses import replace
from typing import Final

from fastapi import APIRouter, Request, Response

from twinkle_dask.operations.adapter_batches import PassResult
from twinkle_dask.operations.adapter_settings import (
    AdapterSettings,
    accumulation_of,
    finite,
)
from twinkle_dask.operations.adapters import Adapter
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import ServedModel, Tenant
from twinkle_dask.optimizers import clip_gradient
from twinkle_dask.types import Json, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import let_go, size_of
from twinkle_dask_gateway.twinkle.calls import (
    ModelDep,
    SessionDep,
    json_answer,
    nothing,
    read,
    write,
)
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute
from twinkle_dask_gateway.twinkle.features import Row, padded
from twinkle_dask_gateway.twinkle.openapi import VOID
from twinkle_dask_gateway.twinkle.passes import PassArguments, batch_of, encoded
from twinkle_dask_gateway.twinkle.replies import adapters as replies
from twinkle_dask_gateway.twinkle.wire import adapters as wire

routes = APIRouter(route_class=TwinkleRoute)

_MODEL: Final = "/model/{model_id:path}/twinkle"


@routes.post(
    f"{_MODEL}/forward_backward",
    openapi_extra=takes(wire.Pass),
    responses=gives(replies.PassDone),
)
async def twinkle_forward_backward(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
) -> Response:
    """Add the gradient of a batch by the adapter's loss."""
    body = await read(request, wire.Pass)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    given = PassArguments.of(body.model_extra, gradient=True)
    rows = await _rows(request, service, tenant, model, adapter, body, config)
    await _accumulate(service, tenant, adapter, given.accumulation)
    done = await service.adapter_training.forward_backward(
        tenant, adapter.run, batch_of(rows, given), given.loss
    )
    return await _answer(rows, done, config, loss=True)


@routes.post(f"{_MODEL}/forward", openapi_extra=takes(wire.Pass), responses=gives(replies.PassDone))
async def twinkle_forward(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
) -> Response:
    """Score a batch, for ``calculate_loss`` and ``backward`` to go on with."""
    body = await read(request, wire.Pass)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    given = PassArguments.of(body.model_extra)
    return await _forward(
        request, service, tenant, model, adapter, body, given, config, training=True
    )


@routes.post(
    f"{_MODEL}/forward_only",
    openapi_extra=takes(wire.ForwardOnlyPass),
    responses=gives(replies.PassDone),
)
async def twinkle_forward_only(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
) -> Response:
    """Score a batch without a gradient, with ``disable_lora`` by the base model alone."""
    body = await read(request, wire.ForwardOnlyPass)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    given = PassArguments.of(body.model_extra, may_disable=True)
    return await _forward(
        request, service, tenant, model, adapter, body, given, config, training=False
    )


@routes.post(
    f"{_MODEL}/calculate_loss",
    openapi_extra=takes(wire.AdapterCall),
    responses=gives(replies.LossCalculated),
)
async def twinkle_calculate_loss(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """The loss of the batch that went forward last."""
    body = await read(request, wire.AdapterCall)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    arguments = dict(body.model_extra or {})
    loss = await service.adapter_training.calculate_loss(tenant, adapter.run, arguments)
    return write(replies.LossCalculated(result=loss))


@routes.post(f"{_MODEL}/backward", openapi_extra=takes(wire.AdapterCall), responses=VOID)
async def twinkle_backward(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Add the gradient of the batch that went forward last."""
    body = await read(request, wire.AdapterCall)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    await _accumulate(service, tenant, adapter, _accumulation(body))
    await service.adapter_training.backward(tenant, adapter.run)
    return nothing()


@routes.post(
    f"{_MODEL}/clip_grad_norm",
    openapi_extra=takes(wire.Clip),
    responses=gives(replies.Clipped),
)
async def twinkle_clip_grad_norm(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Divide the gradient by what it was counted for, clip it, and tell its norm before that."""
    body = await read(request, wire.Clip)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    done = await service.adapter_steps.step(
        tenant,
        adapter.run,
        clip=clip_gradient(body.max_grad_norm, body.norm_type),
        accumulation=_accumulation(body),
    )
    return write(replies.Clipped(result=str(done.grad_norm)))


@routes.post(f"{_MODEL}/step", openapi_extra=takes(wire.AdapterCall), responses=VOID)
async def twinkle_step(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Take an optimizer step; nothing between boundaries."""
    return await _part(request, model, session, service, tenant, step=True)


@routes.post(f"{_MODEL}/zero_grad", openapi_extra=takes(wire.AdapterCall), responses=VOID)
async def twinkle_zero_grad(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Forget the gradient; nothing between boundaries."""
    return await _part(request, model, session, service, tenant, zero=True)


@routes.post(f"{_MODEL}/lr_step", openapi_extra=takes(wire.AdapterCall), responses=VOID)
async def twinkle_lr_step(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Move the learning rate's schedule on; nothing between boundaries."""
    return await _part(request, model, session, service, tenant, advance=True)


@routes.post(f"{_MODEL}/clip_grad_and_step", openapi_extra=takes(wire.Clip), responses=VOID)
async def twinkle_clip_grad_and_step(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Clip, step, zero and move on in one call."""
    body = await read(request, wire.Clip)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    await service.adapter_steps.step(
        tenant,
        adapter.run,
        clip=clip_gradient(body.max_grad_norm, body.norm_type),
        step=True,
        zero=True,
        advance=True,
        accumulation=_accumulation(body),
    )
    return nothing()


@routes.post(
    f"{_MODEL}/calculate_metric",
    openapi_extra=takes(wire.CalculateMetric),
    responses=gives(replies.Metrics),
)
async def twinkle_calculate_metric(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """What the metrics have gathered since they were asked last."""
    body = await read(request, wire.CalculateMetric)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    found = await service.adapter_training.calculate_metric(
        tenant, adapter.run, training=body.is_training
    )
    return write(replies.Metrics(result=finite(found)))


async def _part(
    request: Request,
    model: ServedModel,
    session: SessionId,
    service: Service,
    tenant: Tenant,
    *,
    step: bool = False,
    zero: bool = False,
    advance: bool = False,
) -> Response:
    body = await read(request, wire.AdapterCall)
    adapter = await service.adapters.get(tenant, session, body.adapter_name, model)
    await service.adapter_steps.step(
        tenant,
        adapter.run,
        step=step,
        zero=zero,
        advance=advance,
        accumulation=_accumulation(body),
    )
    return nothing()


async def _forward(
    request: Request,
    service: Service,
    tenant: Tenant,
    model: ServedModel,
    adapter: Adapter,
    body: wire.Pass | wire.ForwardOnlyPass,
    given: PassArguments,
    config: GatewayConfig,
    *,
    training: bool,
) -> Response:
    rows = await _rows(request, service, tenant, model, adapter, body, config)
    await _accumulate(service, tenant, adapter, given.accumulation)
    done = await service.adapter_training.forward(
        tenant,
        adapter.run,
        batch_of(rows, given),
        training=training,
        use_adapter=given.use_adapter,
        want_logits=given.want_logits,
        arguments=given.loss,
    )
    return await _answer(rows, done, config, loss=False)


async def _rows(
    request: Request,
    service: Service,
    tenant: Tenant,
    model: ServedModel,
    adapter: Adapter,
    body: wire.Pass | wire.ForwardOnlyPass,
    config: GatewayConfig,
) -> list[Row]:
    size = await size_of(request)
    inputs, body.inputs = body.inputs, None
    try:
        return await encoded(service, tenant, model, adapter, inputs, size, config)
    finally:
        if size > config.thread_above_bytes:
            await asyncio.to_thread(let_go, inputs)


async def _accumulate(
    service: Service, tenant: Tenant, adapter: Adapter, accumulation: int | None
) -> None:
    """``gradient_accumulation_steps`` of a call is the adapter's from then on."""
    if accumulation is None or accumulation == adapter.settings.accumulation:
        return

    def changed(settings: AdapterSettings) -> AdapterSettings:
        return replace(settings, accumulation=accumulation)

    await service.adapters.change(tenant, adapter.run, changed)


def _accumulation(body: wire.AdapterCall) -> int | None:
    value = (body.model_extra or {}).get("gradient_accumulation_steps")
    return None if value is None else accumulation_of(value)


async def _answer(
    rows: list[Row], done: PassResult, config: GatewayConfig, *, loss: bool
) -> Response:
    result: Json = {"logits": None, "logps": None, "past_key_values": None}
    size = 0
    if done.logprobs is not None:
        result["logps"] = padded(rows, done.logprobs)
    if done.logits is not None:
        result["logits"] = padded(rows, done.logits)
    if done.embeddings is not None:
        result["embeddings"] = done.embeddings
    if loss:
        result["loss"] = finite(done.loss)
    size = sum(value.nbytes for value in result.values() if hasattr(value, "nbytes")) * 3
    return await json_answer({"result": result}, config, num_bytes=size)
