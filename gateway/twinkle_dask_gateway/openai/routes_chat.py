"""Chat completions, and what can answer."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from twinkle_dask.errors import NotFound, TwinkleDaskError
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import CheckpointAddress, ServedModel, Tenant
from twinkle_dask.types import Json, SamplePart, SampleRequest
from twinkle_dask_gateway.addresses import is_address, parse_address
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import PollsDep, ServiceDep
from twinkle_dask_gateway.openai import answering, asking, replies, wire
from twinkle_dask_gateway.openai.cutting import Cut
from twinkle_dask_gateway.openai.errors import ChatRoute, WrongField, body_of
from twinkle_dask_gateway.openapi import Answers, gives, takes
from twinkle_dask_gateway.polls import Polls
from twinkle_dask_gateway.reading import read_object
from twinkle_dask_gateway.samples import DrawnStream, Followed, followed

routes = APIRouter(route_class=ChatRoute)

FAILURES: Answers = {
    status: {"description": told, "model": replies.ChatError}
    for status, told in {
        400: "The request cannot be fulfilled as it is.",
        401: "The key is missing or unknown.",
        403: "The key does not permit this.",
        404: "There is no such model, or it is another tenant's.",
        429: "Too much at once; send it again after `Retry-After` seconds.",
        500: "A failure of the service, with the incident's id for its operator.",
        503: "The service is full or stopping.",
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """A chat that is being answered."""

    service: Service
    tenant: Tenant
    model: ServedModel
    body: wire.ChatCompletionRequest
    heading: answering.Heading
    num_prompt_tokens: int
    sample: Followed
    polls: Polls

    @property
    def num_choices(self) -> int:
        return self.body.n or 1

    async def logprobs(self, parts: Sequence[SamplePart]) -> Json | None:
        """Of parts of one choice, if they were asked for."""
        if not self.body.logprobs:
            return None
        tokens = sorted(answering.tokens_in(parts))
        words = await self.service.templates.decode(
            self.tenant, self.model.name, [[token] for token in tokens]
        )
        return answering.logprobs_of(parts, dict(zip(tokens, words, strict=True)))

    def cuts(self) -> list[Cut]:
        return [Cut(asking.stops_of(self.body)) for _ in range(self.num_choices)]


@routes.post(
    "/chat/completions",
    openapi_extra=takes(wire.ChatCompletionRequest),
    responses=gives(replies.ChatCompletion),
)
async def chat_completions(
    request: Request, service: ServiceDep, tenant: TenantDep, polls: PollsDep
) -> Response:
    """Answer a conversation, whole or as server-sent events while it is drawn."""
    body = await _read(request)
    asking.check_fields(body)
    params = asking.params_of(body)
    trajectory = asking.conversation(body)
    model, address = await _which(service, tenant, body)
    options = body.chat_template_kwargs or wire.ChatTemplateOptions()
    spec = service.templates.spec(
        model.name,
        "Template",
        {"enable_thinking": options.enable_thinking, "max_length": model.facts.context_length},
    )
    (feature,) = await service.templates.encode(
        tenant, model.name, spec, [trajectory], add_generation_prompt=True
    )
    session = await service.sampled_weights.standing_session(tenant)
    sampler = await service.sampled_weights.sampler(tenant, session, model, address=address)
    prompt = np.array(feature["input_ids"], np.int32)
    wish = SampleRequest(
        prompt=prompt,
        params=params,
        num_samples=1 if body.n is None else body.n,
        topk_sample_logprobs=body.top_logprobs or 0,
    )
    stack = AsyncExitStack()
    chat = _Chat(
        service=service,
        tenant=tenant,
        model=model,
        body=body,
        heading=answering.Heading(body.model),
        num_prompt_tokens=len(prompt),
        sample=await stack.enter_async_context(followed(service, tenant, sampler, wish)),
        polls=polls,
    )
    if body.stream:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return DrawnStream(stack, _events(chat), "text/event-stream", headers)
    async with stack:
        whole = await polls.answer(request, _whole(chat))
    return Response(orjson.dumps(whole), media_type="application/json")


@routes.get("/models")
async def chat_models(service: ServiceDep) -> replies.ChatModels:
    """The base models; sampler weights answer under their address as well."""
    return replies.ChatModels(
        data=[replies.ChatModel(id=model.name) for model in service.catalogue.all()]
    )


@routes.get("/models/{model:path}")
async def chat_model(model: str, service: ServiceDep, tenant: TenantDep) -> replies.ChatModel:
    """Whether something can answer."""
    if is_address(model):
        await service.sampled_weights.at(tenant, parse_address(model, "twinkle"))
    elif service.catalogue.find(model) is None:
        raise _unknown(service, model)
    return replies.ChatModel(id=model)


async def _read(request: Request) -> wire.ChatCompletionRequest:
    fields = await read_object(request)
    try:
        return wire.ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step)[:60] for step in problem["loc"])
        raise WrongField(f"{where}: {problem['msg']}", where) from None


async def _which(
    service: Service, tenant: Tenant, body: wire.ChatCompletionRequest
) -> tuple[ServedModel, CheckpointAddress | None]:
    """What answers: a base model, or weights under their address, which may stand beside it."""
    if is_address(body.model):
        if body.adapter_uri and body.adapter_uri != body.model:
            raise WrongField("The model names weights already.", "adapter_uri")
        address = parse_address(body.model, "twinkle")
        return await service.sampled_weights.at(tenant, address), address
    model = service.catalogue.find(body.model)
    if model is None:
        raise _unknown(service, body.model)
    address = parse_address(body.adapter_uri, "twinkle") if body.adapter_uri else None
    return model, address


def _unknown(service: Service, model: str) -> NotFound:
    served = ", ".join(sorted(one.name for one in service.catalogue.all()))
    return NotFound(
        f"There is no model {model[:80]!r} here. Served: {served}; weights saved for sampling "
        "answer under their twinkle:// or tinker:// address."
    )


async def _whole(chat: _Chat) -> Json:
    """The answer once all of it is drawn."""
    parts: list[list[SamplePart]] = [[] for _ in range(chat.num_choices)]
    async for part in chat.sample.parts():
        parts[part.index].append(part)
    result = await chat.sample.result()
    choices: list[Json] = []
    for index, (sequence, drawn) in enumerate(zip(result.sequences, parts, strict=True)):
        cut = Cut(asking.stops_of(chat.body))
        text = "".join(cut.add("".join(part.texts)) for part in drawn) + cut.rest()
        message = answering.message_of(text, calls=asking.wants_calls(chat.body))
        choices.append(
            {
                "index": index,
                "message": message | {"refusal": None},
                "logprobs": await chat.logprobs(drawn),
                "finish_reason": _reason(message, str(sequence.stop_reason)),
            }
        )
    return chat.heading.completion(choices, _usage(chat, result.sequences))


async def _events(chat: _Chat) -> AsyncGenerator[bytes]:
    try:
        async for chunk in _chunks(chat):
            yield b"data: " + orjson.dumps(chunk) + b"\n\n"
    except TwinkleDaskError as error:
        yield b"data: " + orjson.dumps(body_of(error)) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _chunks(chat: _Chat) -> AsyncGenerator[Json]:
    """The answer as it is drawn; with tools each choice comes whole, since calls end with it."""
    calls, cuts = asking.wants_calls(chat.body), chat.cuts()
    for index in range(chat.num_choices):
        start = {"role": "assistant", "content": "", "refusal": None}
        yield chat.heading.chunk([_choice(index, start)])
    texts = [""] * chat.num_choices
    async for part in chat.polls.each(chat.sample.parts()):
        text, logprobs = cuts[part.index].add("".join(part.texts)), await chat.logprobs([part])
        if calls:
            texts[part.index] += text
            text = ""
        if text or logprobs is not None:
            yield chat.heading.chunk([_choice(part.index, {"content": text}, logprobs)])
    result = await chat.polls.unless_stopping(chat.sample.result())
    for index, (sequence, cut) in enumerate(zip(result.sequences, cuts, strict=True)):
        message = answering.message_of(texts[index] + cut.rest(), calls=calls)
        if message["content"] or "tool_calls" in message:
            yield chat.heading.chunk([_choice(index, answering.delta_of(message))])
        reason = _reason(message, str(sequence.stop_reason))
        yield chat.heading.chunk([_choice(index, {}, None, reason)])
    if chat.body.stream_options is not None and chat.body.stream_options.include_usage:
        yield chat.heading.chunk([], _usage(chat, result.sequences))


def _choice(
    index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None
) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _reason(message: Json, stop_reason: str) -> str:
    return "tool_calls" if "tool_calls" in message else stop_reason


def _usage(chat: _Chat, sequences: Sequence[Any]) -> Json:
    drawn = sum(len(sequence.tokens) for sequence in sequences)
    return answering.usage_of(chat.num_prompt_tokens, drawn)
