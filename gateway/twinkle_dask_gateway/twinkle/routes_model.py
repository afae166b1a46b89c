"""Adapters and their settings."""

import asyncio
from dataclasses import replace
from typing import Final

from fastapi import APIRouter, Request, Response

from twinkle_dask.batch_losses import loss_spec
from twinkle_dask.errors import NotSupported
from twinkle_dask.operations.adapter_metrics import with_metric
from twinkle_dask.operations.adapter_settings import AdapterSettings, Named, accumulation_of
from twinkle_dask.operations.adapters import Adapter, run_of
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import ServedModel, Tenant
from twinkle_dask.optimizers import optimizer_spec, schedule_spec
from twinkle_dask.types import Json, SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.twinkle.calls import (
    ModelDep,
    SessionDep,
    json_answer,
    nothing,
    read,
    write,
)
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute
from twinkle_dask_gateway.twinkle.lora_config import read_lora
from twinkle_dask_gateway.twinkle.openapi import VOID
from twinkle_dask_gateway.twinkle.processors import processor_of
from twinkle_dask_gateway.twinkle.replies import adapters as replies
from twinkle_dask_gateway.twinkle.replies.base import Fine
from twinkle_dask_gateway.twinkle.wire import adapters as wire

routes = APIRouter(route_class=TwinkleRoute)

_MODEL: Final = "/model/{model_id:path}/twinkle"


@routes.post(f"{_MODEL}/create", openapi_extra=takes(wire.ModelCall, required=False))
async def twinkle_create(_model: ModelDep) -> Fine:
    """Whether a base model is served; nothing is made."""
    return Fine()


@routes.post(
    f"{_MODEL}/add_adapter_to_model",
    openapi_extra=takes(wire.AddAdapter),
    responses=gives(replies.AdapterAdded),
)
async def twinkle_add_adapter(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Make an adapter; its training run is ``<session>-<adapter_name>``."""
    body = await read(request, wire.AddAdapter)
    run_of(session, body.adapter_name)
    lora = read_lora(body.config)
    save_dir = body.save_dir
    if save_dir is not None:
        save_dir = await asyncio.to_thread(service.save_roots.check, save_dir)
    run = await service.adapters.add(
        tenant,
        session,
        name=body.adapter_name,
        base_model=model.name,
        lora=lora,
        settings=AdapterSettings(
            adapter=body.adapter_name,
            accumulation=accumulation_of(body.gradient_accumulation_steps),
            save_dir=save_dir,
        ),
    )
    return write(replies.AdapterAdded(adapter_name=run))


@routes.post(f"{_MODEL}/set_template", openapi_extra=takes(wire.SetTemplate), responses=VOID)
async def twinkle_set_template(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Say how an adapter's trajectories are encoded."""
    body = await read(request, wire.SetTemplate)
    given = _arguments(body)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    service.templates.spec(model.name, body.template_cls, given)
    await _set(service, tenant, adapter, template=Named(name=body.template_cls, settings=given))
    return nothing()


@routes.post(f"{_MODEL}/set_processor", openapi_extra=takes(wire.SetProcessor), responses=VOID)
async def twinkle_set_processor(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Say how an adapter's inputs are put together."""
    body = await read(request, wire.SetProcessor)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    named = processor_of(body.processor_cls, _arguments(body))
    await _set(service, tenant, adapter, processor=named)
    return nothing()


@routes.post(f"{_MODEL}/set_loss", openapi_extra=takes(wire.SetLoss), responses=VOID)
async def twinkle_set_loss(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Choose an adapter's loss."""
    body = await read(request, wire.SetLoss)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    spec = loss_spec(body.loss_cls, _arguments(body))
    await _set(service, tenant, adapter, loss=Named(name=spec.name, settings=_arguments(body)))
    return nothing()


@routes.post(f"{_MODEL}/set_optimizer", openapi_extra=takes(wire.SetOptimizer), responses=VOID)
async def twinkle_set_optimizer(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Choose an adapter's optimizer; it starts without memory and without a schedule."""
    body = await read(request, wire.SetOptimizer)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    optimizer_spec(body.optimizer_cls, _arguments(body))
    named = Named(name=body.optimizer_cls, settings=_arguments(body))
    await service.adapter_steps.set_optimizer(tenant, adapter.run, named)
    return nothing()


@routes.post(f"{_MODEL}/set_lr_scheduler", openapi_extra=takes(wire.SetScheduler), responses=VOID)
async def twinkle_set_lr_scheduler(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Choose what an adapter's learning rate follows, from its beginning."""
    body = await read(request, wire.SetScheduler)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    schedule_spec(body.scheduler_cls, _arguments(body))
    named = Named(name=body.scheduler_cls, settings=_arguments(body))
    await service.adapter_steps.set_schedule(tenant, adapter.run, named)
    return nothing()


@routes.post(f"{_MODEL}/add_metric", openapi_extra=takes(wire.AddMetric), responses=VOID)
async def twinkle_add_metric(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Have one more thing measured in training, evaluation, or both."""
    body = await read(request, wire.AddMetric)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    named = Named(name=body.metric_cls, settings=_arguments(body))
    changed = with_metric(named, body.is_training)
    await service.adapters.change(tenant, adapter.run, changed)
    return nothing()


@routes.post(f"{_MODEL}/apply_patch", openapi_extra=takes(wire.ApplyPatch), responses=VOID)
async def twinkle_apply_patch(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """Refuse: a patch is code, and it would change the base model of every tenant.

    Raises:
        NotSupported: Always, if the adapter is there.
    """
    body = await read(request, wire.ApplyPatch)
    await _adapter(service, tenant, session, model, body.adapter_name)
    raise NotSupported(
        f"Patch {body.patch_cls[:80]!r} is not applied: a patch is code from outside, and would "
        "change the base model that all tenants share. No patch is on this server's list."
    )


@routes.post(
    f"{_MODEL}/get_train_configs",
    openapi_extra=takes(wire.AdapterCall),
    responses=gives(replies.TrainConfigs),
)
async def twinkle_get_train_configs(
    request: Request, model: ModelDep, session: SessionDep, service: ServiceDep, tenant: TenantDep
) -> Response:
    """What an adapter is and is set to, in lines."""
    body = await read(request, wire.AdapterCall)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    return write(replies.TrainConfigs(result=await service.adapter_state.summary(tenant, adapter)))


@routes.post(
    f"{_MODEL}/get_state_dict",
    openapi_extra=takes(wire.AdapterCall),
    responses=gives(replies.StateDict),
)
async def twinkle_get_state_dict(
    request: Request,
    model: ModelDep,
    session: SessionDep,
    service: ServiceDep,
    tenant: TenantDep,
    config: ConfigDep,
) -> Response:
    """An adapter's weights as nested lists."""
    body = await read(request, wire.AdapterCall)
    adapter = await _adapter(service, tenant, session, model, body.adapter_name)
    weights = await service.adapter_state.weights(tenant, adapter)
    size = sum(array.nbytes for array in weights.values()) * 3
    return await json_answer({"result": weights}, config, num_bytes=size)


async def _adapter(
    service: Service, tenant: Tenant, session: SessionId, model: ServedModel, name: str
) -> Adapter:
    return await service.adapters.get(tenant, session, name, model)


async def _set(service: Service, tenant: Tenant, adapter: Adapter, **named: Named) -> None:
    def changed(settings: AdapterSettings) -> AdapterSettings:
        return replace(settings, **named)

    await service.adapters.change(tenant, adapter.run, changed)


def _arguments(body: wire.AdapterCall) -> Json:
    return dict(body.model_extra or {})
