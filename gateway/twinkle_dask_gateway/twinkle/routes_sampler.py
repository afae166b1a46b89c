"""Samples, and how they are drawn."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from twinkle_dask.errors import InvalidRequest, NotSupported, TwinkleDaskError
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import ServedModel, Tenant
from twinkle_dask.types import Json, SampledSequence, SamplerId, SessionId
from twinkle_dask_gateway.addresses import parse_address
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, PollsDep, ServiceDep
from twinkle_dask_gateway.faults import message_of
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.polls import Polls
from twinkle_dask_gateway.reading import aside, size_of
from twinkle_dask_gateway.samples import DrawnStream, Followed, draw_all, followed
from twinkle_dask_gateway.twinkle import codec_sampling
from twinkle_dask_gateway.twinkle.calls import (
    ModelDep,
    SessionDep,
    json_answer,
    read,
    write,
)
from twinkle_dask_gateway.twinkle.codec_sampling import Continued
from twinkle_dask_gateway.twinkle.errors import TwinkleRoute
from twinkle_dask_gateway.twinkle.features import elements, is_trajectory
from twinkle_dask_gateway.twinkle.replies import base
from twinkle_dask_gateway.twinkle.replies import sampling as replies
from twinkle_dask_gateway.twinkle.sampling_params import Wanted, wanted
from twinkle_dask_gateway.twinkle.wire import sampling as wire

routes = APIRouter(route_class=TwinkleRoute)

_AT = "/sampler/{model_id:path}/twinkle"


@routes.post(
    f"{_AT}/sample", openapi_extra=takes(wire.DrawSamples), responses=gives(replies.Samples)
)
async def twinkle_sample(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    session: SessionDep,
    model: ModelDep,
    config: ConfigDep,
    polls: PollsDep,
) -> Response:
    """Draw continuations of every input, all at the same time; answers are in their order."""
    body = await read(request, wire.DrawSamples)
    asked = _wanted(body)
    sampler = await _sampler(service, tenant, session, model, body)
    features = await _features(service, tenant, session, model, body)
    sent_bytes = await size_of(request)
    prompts = await aside(sent_bytes, config, lambda: codec_sampling.prompts_of(features))
    requests = [codec_sampling.request_of(prompt, asked) for prompt in prompts]
    drawn = await draw_all(request, polls, service, tenant, sampler, requests)
    told = [codec_sampling.told(result, asked) for result in drawn]
    bases = codec_sampling.without_padding(features, prompts)
    continued = await _continued(service, tenant, model, bases, told)
    size = codec_sampling.num_bytes(drawn, features)
    samples = await aside(
        size,
        config,
        lambda: [
            codec_sampling.sampled(result, asked, sequences, after)
            for result, sequences, after in zip(drawn, told, continued, strict=True)
        ],
    )
    return await json_answer({"samples": samples}, config, num_bytes=size)


@routes.post(
    f"{_AT}/sample_stream",
    openapi_extra=takes(wire.DrawSamples),
    response_class=StreamingResponse,
)
async def twinkle_sample_stream(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    session: SessionDep,
    model: ModelDep,
    polls: PollsDep,
) -> Response:
    """Draw continuations of one input and tell tokens as they are drawn, a line of JSON each time.

    A line has ``delta``, ``tokens`` and the sample's ``index``; the last one of each sample has its
    ``finish_reason``. A failure is a line with ``error``, the last one.
    """
    body = await read(request, wire.DrawSamples)
    asked = _wanted(body)
    if asked.score_only or asked.num_prompt_logprobs is not None:
        raise InvalidRequest("A stream tells what is drawn; score prompts with sample instead.")
    num_inputs = len(elements(body.inputs))
    if num_inputs != 1:
        raise InvalidRequest(f"A stream has one input, not {num_inputs}.")
    sampler = await _sampler(service, tenant, session, model, body)
    features = await _features(service, tenant, session, model, body)
    (prompt,) = codec_sampling.prompts_of(features)
    wish = codec_sampling.request_of(prompt, asked)
    stack = AsyncExitStack()
    sample = await stack.enter_async_context(followed(service, tenant, sampler, wish))
    return DrawnStream(stack, _lines(sample, asked, polls), "application/x-ndjson")


@routes.post(f"{_AT}/create", openapi_extra=takes(wire.OpenSampler, required=False))
async def twinkle_create_sampler(
    service: ServiceDep, tenant: TenantDep, session: SessionDep, model: ModelDep
) -> base.Fine:
    """Whether the session may sample a base model. There is nothing to be made before."""
    await service.sampled_weights.sampler(tenant, session, model)
    return base.Fine()


@routes.post(f"{_AT}/set_template", openapi_extra=takes(wire.SamplerTemplate))
async def twinkle_sampler_template(
    request: Request, service: ServiceDep, session: SessionDep, model: ModelDep
) -> base.Fine:
    """How the session's trajectories become tokens from now on, for one adapter's name or none."""
    body = await read(request, wire.SamplerTemplate)
    arguments = body.model_extra or {}
    service.templates.spec(model.name, body.template_cls, arguments)
    template: Json = {"cls": body.template_cls, "arguments": arguments}
    await service.sampled_weights.set_template(session, model, body.adapter_name or "", template)
    return base.Fine()


@routes.post(
    f"{_AT}/add_adapter_to_sampler",
    openapi_extra=takes(wire.SamplerAdapter),
    responses=gives(replies.AdapterNamed),
)
async def twinkle_add_adapter_to_sampler(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    session: SessionDep,
    model: ModelDep,
) -> Response:
    """Let a name stand for saved weights, or for the session's own adapter of that name.

    ``config`` is the weights' own affair and not looked at further.
    """
    body = await read(request, wire.SamplerAdapter)
    _refuse_others(body.model_extra)
    address = parse_address(body.adapter_uri, "twinkle") if body.adapter_uri else None
    await service.sampled_weights.name(tenant, session, model, body.adapter_name, address)
    return write(replies.AdapterNamed(adapter_name=body.adapter_name))


@routes.post(f"{_AT}/apply_patch", openapi_extra=takes(wire.SamplerPatch))
async def twinkle_patch_sampler(
    request: Request, session: SessionDep, model: ModelDep
) -> base.Fine:
    """Refused: code of clients does not run here."""
    await read(request, wire.SamplerPatch)
    raise NotSupported("Patches change the service's code, so samplers take none.")


def _wanted(body: wire.DrawSamples) -> Wanted:
    _refuse_others(body.model_extra)
    return wanted(body.sampling_params, body.num_samples)


def _refuse_others(fields: dict[str, Any] | None) -> None:
    for name, value in (fields or {}).items():
        if value is not None:
            raise InvalidRequest(f"This call takes no {name[:60]!r}.")


async def _sampler(
    service: Service,
    tenant: Tenant,
    session: SessionId,
    model: ServedModel,
    body: wire.DrawSamples,
) -> SamplerId:
    address = parse_address(body.adapter_uri, "twinkle") if body.adapter_uri else None
    return await service.sampled_weights.sampler(
        tenant, session, model, address=address, adapter=body.adapter_name or ""
    )


async def _features(
    service: Service,
    tenant: Tenant,
    session: SessionId,
    model: ServedModel,
    body: wire.DrawSamples,
) -> list[Json]:
    """The inputs, of which trajectories are encoded up to where an answer begins."""
    inputs = elements(body.inputs)
    places = [place for place, one in enumerate(inputs) if is_trajectory(one)]
    if not places:
        return inputs
    adapter = body.adapter_name or ""
    template = await service.sampled_weights.template(session, model, adapter)
    template = template or {"cls": "Template", "arguments": {}}
    spec = service.templates.spec(model.name, template["cls"], template["arguments"])
    encoded = await service.templates.encode(
        tenant, model.name, spec, [inputs[place] for place in places], add_generation_prompt=True
    )
    if len(encoded) != len(places):
        raise InvalidRequest(
            "A trajectory is longer than the template's max_length, which its truncation_strategy "
            "splits or leaves out; a prompt can only be cut. Set 'left', or a larger max_length."
        )
    for place, feature in zip(places, encoded, strict=True):
        inputs[place] = feature
    return inputs


async def _continued(
    service: Service,
    tenant: Tenant,
    model: ServedModel,
    features: list[Json],
    told: list[tuple[SampledSequence, ...]],
) -> list[list[Continued]]:
    """Each input's continuations as text, and as inputs themselves."""
    rows = [
        (feature, sequence.tokens.tolist())
        for feature, sequences in zip(features, told, strict=True)
        for sequence in sequences
    ]
    if model.facts.has_tokenizer:
        found: Sequence[Continued] = await service.templates.continued(
            tenant, model.name, [feature for feature, _ in rows], [row for _, row in rows]
        )
    else:
        found = [(None, None)] * len(rows)
    ends = iter(found)
    return [[next(ends) for _ in sequences] for sequences in told]


async def _lines(sample: Followed, asked: Wanted, polls: Polls) -> AsyncGenerator[bytes]:
    try:
        async for part in polls.each(sample.parts()):
            yield _line(codec_sampling.line_of(part, asked))
        result = await polls.unless_stopping(sample.result())
    except TwinkleDaskError as error:
        yield _line({"error": message_of(error)})
        return
    for index, sequence in enumerate(result.sequences):
        end = {"delta": "", "finish_reason": str(sequence.stop_reason), "index": index}
        yield _line({**end, "tokens": []})


def _line(body: Json) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)
