"""The OpenAPI document says what the routes do."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple, cast

import httpx
import numpy as np
import orjson
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from tests.gateway.in_memory import KEY, MODEL
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import (
    CheckpointAddress,
    Failed,
    Loaded,
    QueueState,
    RunCreated,
    SamplerSaved,
    Saved,
    Ticket,
    TicketKind,
    Waiting,
)
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import (
    ForwardBackwardResult,
    RunId,
    SampledSequence,
    SampleResult,
    SamplerId,
    StepResult,
    StopReason,
    TicketId,
)
from twinkle_dask_gateway.openapi import document
from twinkle_dask_gateway.tinker import answers, codec, codec_json, codec_sampling, replies

# For whoever knows the address; every other route asks for a key.
OPEN = {
    "/api/v1/healthz",
    "/api/v1/twinkle/healthz",
    "/api/v1/downloads/{checkpoint}/{file}",
    "/api/v1/traces/{session}",
}
PATH = {
    "model_id": MODEL,
    "run": "s0:train:0",
    "session": "s0",
    "sampler": "s0:sample:0",
    "kind": "weights",
}


class Operation(NamedTuple):
    method: str
    path: str
    says: dict[str, Any]


@pytest.fixture
def told(app: FastAPI) -> dict[str, Any]:
    return document(app)


@pytest.fixture
def operations(told: dict[str, Any]) -> list[Operation]:
    return [
        Operation(method.upper(), path, says)
        for path, methods in told["paths"].items()
        for method, says in methods.items()
    ]


async def test_it_is_served_to_tenants_only(
    client: httpx.AsyncClient, told: dict[str, Any]
) -> None:
    served = await client.get("/openapi.json")
    assert served.json() == told
    assert (await client.get("/openapi.json", headers={"x-api-key": "?"})).status_code == 401


def test_every_reference_leads_somewhere(told: dict[str, Any]) -> None:
    models = told["components"]["schemas"]
    references = [each for key, each in entries(told) if key == "$ref"]
    assert {name.removeprefix("#/components/schemas/") for name in references} == set(models)
    assert "$defs" not in json.dumps(told)


def test_every_route_asks_for_a_key_but_the_open_ones(operations: list[Operation]) -> None:
    found = {each.path for each in operations if each.says.get("security") == []}
    assert found == OPEN


def test_every_route_says_what_it_answers(operations: list[Operation]) -> None:
    for method, path, says in operations:
        good = [answer for status, answer in says["responses"].items() if status < "4"]
        assert good, (method, path)
        for answer in good:
            for media_type, content in answer.get("content", {}).items():
                # Of a file there is nothing to say.
                assert content.get("schema") or media_type != "application/json", (method, path)


async def test_every_route_says_whether_it_reads_a_body(
    app: FastAPI, client: httpx.AsyncClient, operations: list[Operation]
) -> None:
    await client.post("/create_session", json={})  # s0
    # The one that ends the key comes last.
    operations.sort(key=lambda each: each.path.endswith("/auth/apikey/me"))
    for method, path, says in operations:
        concrete = path.format_map(Anything(PATH))
        body = says.get("requestBody")
        if body is not None and not body["required"]:
            continue  # it may be let be
        assert await reads_a_body(app, method, concrete) == (body is not None), (method, path)


class Anything(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "x"


async def reads_a_body(app: FastAPI, method: str, path: str) -> bool:
    """Whether a route asks for a request's body before it answers."""
    asked = answered = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked = asked or not answered
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal answered
        answered = True

    headers = [
        (b"x-api-key", KEY.encode()),
        (b"content-type", b"application/json"),
        (b"x-twinkle-session-id", b"s0"),
    ]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "server": ("gateway", 80),
        "client": ("client", 1),
    }
    await app(scope, receive, send)
    assert answered
    return asked


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value, however deep."""
    if isinstance(value, dict):
        for key, each in cast(dict[str, Any], value).items():
            yield key, each
            yield from entries(each)
    elif isinstance(value, list):
        for each in cast(list[Any], value):
            yield from entries(each)


# ---- what is written as bytes is what the document says of it

ADDRESS = CheckpointAddress(run=RunId("s0:train:0"), kind=CheckpointKind.TRAINING, name="n")
SMALL = [
    RunCreated(run=RunId("s0:train:0")),
    StepResult(metrics={"grad_norm:mean": 1.0, "odd:mean": float("nan")}),
    Saved(address=ADDRESS),
    SamplerSaved(address=ADDRESS, sampler=None),
    SamplerSaved(address=None, sampler=SamplerId("s0:sample:0")),
    Loaded(run=RunId("s0:train:0"), address=ADDRESS),
]


@pytest.mark.parametrize("result", SMALL, ids=lambda result: type(result).__name__)
def test_small_results_are_as_told(result: Any) -> None:
    written = codec.small_result(result)
    assert set(written) == set(fits_one(orjson.dumps(written)).model_fields)


def test_logprobs_are_as_told() -> None:
    logprobs = np.array([-0.5, np.nan], np.float32)
    result = ForwardBackwardResult(logprobs=(logprobs,), metrics={"loss:sum": 1.0})
    assert fits_one(codec_json.forward_backward_json(result)) is replies.BatchResult


def test_samples_are_as_told() -> None:
    sequence = SampledSequence(
        tokens=np.array([7], np.int32),
        logprobs=np.array([-0.5], np.float32),
        stop_reason=StopReason.LENGTH,
    )
    scores = np.array([np.nan, -1.0], np.float32)
    result = SampleResult(sequences=(sequence,), prompt_logprobs=scores)
    assert fits_one(codec_sampling.sample_json(result)) is replies.SampleResult


def test_promises_and_what_is_not_there_yet_are_as_told() -> None:
    ticket = Ticket(id=TicketId("r1"), kind=TicketKind.SAMPLE, sequence_ids=("a", "b"))
    replies.Promise.model_validate_json(bytes(answers.promise(ticket).body), strict=True)
    waiting = Waiting(queue_state=QueueState.ACTIVE, reason=None)
    replies.TryAgain.model_validate_json(bytes(answers.not_yet(waiting).body), strict=True)
    failed = answers.failed(Failed(error=InvalidRequest("no")))
    assert fits_one(failed.body) is replies.FailedResult


def fits_one(content: bytes | memoryview) -> type[BaseModel]:
    """The only model of a result that a body fits."""
    fitting: list[type[BaseModel]] = []
    for model in replies.RESULTS:
        with suppress(ValidationError):
            model.model_validate_json(bytes(content), strict=True)
            fitting.append(model)
    (only,) = fitting
    return only
