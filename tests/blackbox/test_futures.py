"""How results come back, and how a client begins, keeps and ends a session."""

import contextlib
import json
import socket
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, datum, random_tokens, train_one_step
from tests.blackbox.wire import PROTOBUF, Wire
from twinkle_dask import LocalService

STEP: dict[str, Any] = {"adam_params": {"learning_rate": 1e-3}}


@pytest.fixture
def session(wire: Wire) -> str:
    return wire.post("create_session", {}).json()["session_id"]


@pytest.fixture
def run(wire: Wire, session: str) -> str:
    create = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": MODEL,
        "lora_config": {"rank": 4},
    }
    created = wire.result(wire.promise("create_model", create))
    assert created["model_id"] == f"{session}:train:0"
    return created["model_id"]


@pytest.fixture
def sampler(wire: Wire, session: str) -> str:
    create = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    return wire.post("create_sampling_session", create).json()["sampling_session_id"]


@pytest.fixture
def background() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def retrieve(wire: Wire, ticket: str) -> httpx.Response:
    body = {"request_id": ticket, "allow_metadata_only": False}
    return wire.post("retrieve_future", body)


def sample_of(sampler: str, seq: int, num_samples: int = 1) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": random_tokens(5, seed=seq)}]},
        "sampling_params": {"max_tokens": 3, "stop": []},
        "num_samples": num_samples,
    }


def log_lines(service: LocalService) -> list[dict[str, Any]]:
    lines = (service.data_dir / "server.log").read_text().splitlines()
    return [cast(dict[str, Any], json.loads(line)) for line in lines if line.startswith("{")]


# ---- polls


@contextlib.contextmanager
def half_a_request(service: LocalService) -> Generator[None]:
    """A tenant in the middle of sending, for whom absent places in the order are awaited."""
    address = urlsplit(service.url)
    head = (
        "POST /api/v1/optim_step HTTP/1.1\r\n"
        f"host: {address.netloc}\r\nx-api-key: {KEY}\r\n"
        "content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    )
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(head.encode())
        yield


def test_a_poll_is_held_until_there_is_a_result(
    wire: Wire, run: str, service: LocalService, background: ThreadPoolExecutor
) -> None:
    """A client polls again at once, so an early answer would be a hot loop."""
    with half_a_request(service):
        second = wire.promise("optim_step", {"model_id": run, "seq_id": 2, **STEP})
        poll: Future[httpx.Response] = background.submit(retrieve, wire, second)
        with pytest.raises(TimeoutError):
            poll.result(timeout=4)
        first = wire.promise("optim_step", {"model_id": run, "seq_id": 1, **STEP})
        answer = poll.result()
    # One poll, and the result came in its answer.
    assert answer.status_code == 200
    assert answer.json()["metrics"] == {"grad_norm:mean": 0.0}
    assert retrieve(wire, first).status_code == 200


def test_a_result_can_be_read_again(wire: Wire, run: str, service: LocalService) -> None:
    """An answer may get lost on its way, with the connection or with the client's patience."""
    with half_a_request(service):
        ticket = wire.forward_backward(run, 2, batch())
        with (
            httpx.Client(base_url=f"{service.url}/api/v1/", headers={"x-api-key": KEY}) as hasty,
            pytest.raises(httpx.ReadTimeout),
        ):
            hasty.post("retrieve_future", json={"request_id": ticket}, timeout=0.5)
        wire.promise("optim_step", {"model_id": run, "seq_id": 1, **STEP})
        first = wire.wait(ticket)
    again = wire.wait(ticket)
    assert first.headers["content-type"] == again.headers["content-type"] == PROTOBUF
    assert first.content == again.content
    assert len(first.content) > 100


def test_a_result_of_numbers_is_protobuf_to_whoever_reads_it(wire: Wire, run: str) -> None:
    ticket = wire.forward_backward(run, 1, batch())
    wire.wait(ticket)
    assert retrieve(wire, ticket).headers["content-type"] == "application/json"
    metrics = retrieve(wire, ticket).json()["metrics"]
    assert metrics["loss:sum"] == pytest.approx(wire.metrics(ticket)["loss:sum"])
    assert all(name.count(":") == 1 for name in metrics)


@pytest.mark.parametrize("ticket", ["none", "0" * 24, "../results/x", "x" * 256])
def test_an_unknown_future_is_not_found(wire: Wire, ticket: str) -> None:
    answer = retrieve(wire, ticket)
    assert answer.status_code == 404
    assert "There is no request" in answer.json()["detail"]


def test_another_tenants_future_is_not_found(
    wire: Wire, sampler: str, service: LocalService
) -> None:
    ticket = wire.promise("asample", sample_of(sampler, 0))
    with Wire(service.url, OTHER_KEY) as other:
        pending = retrieve(other, ticket)
        wire.wait(ticket)
        finished = retrieve(other, ticket)
    for answer in (pending, finished):
        assert answer.status_code == 404
        assert answer.json()["detail"] == retrieve(wire, "x" * 24).json()["detail"].replace(
            "x" * 24, ticket
        )


def test_a_failed_future_is_no_failed_poll(
    client: tinker.ServiceClient, wire: Wire, background: ThreadPoolExecutor
) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    tokens = random_tokens(6, seed=1)
    bad = datum(tokens, weights=None, logprobs=[-1e30] * 5, advantages=[1.0] * 5)
    with pytest.raises(tinker.RequestFailedError) as failed:
        run.forward_backward([bad], "importance_sampling").result()
    assert failed.value.category is types.RequestErrorCategory.User
    for _ in range(2):
        answer = retrieve(wire, failed.value.request_id)
        assert answer.status_code == 200
        assert answer.json()["category"] == "user"
        assert answer.json()["error"] in str(failed.value)
    assert train_one_step(run, batch()) > 0


def test_giving_up_on_a_result_does_not_lose_it(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    future = run.forward_backward([datum(random_tokens(513, seed=1))] * 4, "cross_entropy")
    with pytest.raises(TimeoutError):
        future.result(timeout=0)
    assert future.result().metrics["loss:sum"] > 0


# ---- repeated submits


def test_a_repeated_sample_is_the_same_sample(wire: Wire, sampler: str) -> None:
    first = wire.post("asample", sample_of(sampler, 0, num_samples=3)).json()
    assert len(set(first["sample_sequence_ids"])) == 3
    done = wire.wait(first["request_id"])
    again = wire.post("asample", sample_of(sampler, 0, num_samples=3)).json()
    assert again == first
    assert wire.wait(again["request_id"]).content == done.content
    other = wire.post("asample", sample_of(sampler, 10**18, num_samples=3)).json()
    assert not set(other["sample_sequence_ids"]) & set(first["sample_sequence_ids"])


def test_samples_sent_twice_at_a_time_are_drawn_once(
    wire: Wire, sampler: str, background: ThreadPoolExecutor
) -> None:
    submits = [background.submit(wire.promise, "asample", sample_of(sampler, 7)) for _ in range(8)]
    assert len({submit.result() for submit in submits}) == 1


def test_a_session_is_opened_once_per_idempotency_key(service: LocalService, wire: Wire) -> None:
    headers = {"content-type": "application/json", "x-idempotency-key": "once-and-again"}
    ids = [wire.send("create_session", b"{}", headers).json()["session_id"] for _ in range(2)]
    assert ids[0] == ids[1]
    with Wire(service.url, OTHER_KEY) as other:
        assert other.send("create_session", b"{}", headers).json()["session_id"] != ids[0]


# ---- errors


def test_errors_are_whole_and_plain(wire: Wire, run: str, session: str) -> None:
    """The SDK takes a 400 without a length, or a compressed one, for a proxy's glitch."""
    create = {"session_id": session, "model_seq_id": 1, "base_model": "none"}
    headers = {"content-type": "application/json", "accept-encoding": "gzip, deflate, zstd"}
    for path, body, status in (
        ("create_model", create, 400),
        ("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {"beta1": 2}}, 400),
        ("optim_step", {"model_id": "none", **STEP}, 404),
        ("save_weights", {"model_id": run, "path": ""}, 400),
        ("asample", {}, 400),
        ("save_weights_external", {"model_id": run, "path": "e"}, 400),
    ):
        answer = wire.send(path, json.dumps(body).encode(), headers)
        assert answer.status_code == status
        assert int(answer.headers["content-length"]) == len(answer.content) > 0
        assert not {"content-encoding", "transfer-encoding"} & answer.headers.keys()
        assert isinstance(answer.json()["detail"], str)


def test_a_mistake_shows_at_once(client: tinker.ServiceClient) -> None:
    """The SDK drains its telemetry before it raises; a bad answer there would cost 30 s."""
    run = client.create_lora_training_client(MODEL, rank=4).result()
    assert run.get_telemetry() is not None
    began = time.monotonic()
    with pytest.raises(tinker.BadRequestError):
        run.forward_backward(batch(), cast(Any, "none")).result()
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=f"tinker://{run.model_id}/weights/no").result()
    assert time.monotonic() - began < 10


def test_no_mistake_so_far_was_answered_in_a_way_that_is_repeated(
    service: LocalService, wire: Wire, run: str
) -> None:
    """By any test of this session: the SDK would go on repeating it for minutes."""
    wire.post("save_weights", {"model_id": run, "path": "/"})
    requests = [line for line in log_lines(service) if line["event"] == "request"]
    assert requests
    repeated = [r for r in requests if r["status"] in {408, 409, 429} or r["status"] >= 500]
    assert repeated == []


# ---- sessions


def test_a_clients_settings(wire: Wire) -> None:
    config = wire.post("client/config", {"sdk_version": "0.38.0"})
    dynamic = wire.post("client/dynamic_config", {"sdk_version": "0.38.0"})
    assert config.status_code == dynamic.status_code == 200
    # What is not there must not be switched on.
    for flag in ("pjwt_auth_enabled", "sample_use_retrieve_futures", "custom_loss_server_side"):
        assert config.json().get(flag, False) is False
    telemetry = {"events": [{"event": "SESSION_START"}], "session_id": "s", "platform": "Linux"}
    assert wire.post("telemetry", telemetry).json() == {"status": "accepted"}
    assert wire.get("healthz").json() == {"status": "ok"}


def test_capabilities_list_every_model(service: LocalService) -> None:
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    models = rest.get_server_capabilities().result().supported_models
    assert {model.model_name: model.max_context_length for model in models} == {
        MODEL: 2048,
        ALIAS: 2048,
    }


def test_a_base_url_may_end_with_a_slash(service: LocalService) -> None:
    with tinker.ServiceClient(base_url=f"{service.url}/", api_key=KEY) as client:
        sampler = client.create_sampling_client(base_model=MODEL).result()
        prompt = types.ModelInput.from_ints([20, 21])
        response = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()
        assert len(response.sequences) == 1


def test_a_heartbeat_is_answered_until_the_session_is_closed(
    service: LocalService, wire: Wire
) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=KEY)
    run = client.create_lora_training_client(MODEL, rank=4).result()
    session = client.holder.get_session_id()
    beat = {"session_id": session, "type": "session_heartbeat"}
    assert wire.post("session_heartbeat", beat).json() == {"type": "session_heartbeat"}
    client.close("success", detail="done").result()
    assert wire.post("session_heartbeat", beat).status_code == 410
    # The first ending stands, and a second is no mistake.
    finish = {"reason": {"type": "errored"}, "detail": None}
    assert wire.post(f"sessions/{session}/finish", finish).status_code == 200
    for path, body in (
        ("optim_step", {"model_id": run.model_id, "seq_id": 1, **STEP}),
        ("create_model", {"session_id": session, "model_seq_id": 5, "base_model": MODEL}),
        (
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 5, "base_model": MODEL},
        ),
    ):
        answer = wire.post(path, body)
        assert answer.status_code == 400
        assert session in answer.json()["detail"]
    assert reasons(service, session) == ["success"]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "success"), (ValueError, "errored"), (Interrupted, "interrupted")],
)
def test_a_session_ends_as_its_block_did(
    service: LocalService, error: type[BaseException] | None, reason: str
) -> None:
    session = ""
    with (
        contextlib.suppress(ValueError, Interrupted),
        tinker.ServiceClient(base_url=service.url, api_key=KEY) as client,
    ):
        session = client.holder.get_session_id()
        if error is not None:
            raise error
    assert reasons(service, session) == [reason]


def reasons(service: LocalService, session: str) -> list[str]:
    return [
        line["reason"]
        for line in log_lines(service)
        if line["event"] == "session_ended" and line["session"] == session
    ]


def test_every_time_has_a_zone(client: tinker.ServiceClient, service: LocalService) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    run.save_state("ck", ttl_seconds=7200).result()
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    info = rest.get_training_run(run.model_id).result()
    (saved,) = rest.list_checkpoints(run.model_id).result().checkpoints
    assert info.last_request_time.tzinfo is not None
    assert saved.time.tzinfo is not None
    assert saved.expires_at is not None
    assert 7000 < (saved.expires_at - saved.time).total_seconds() < 7400
