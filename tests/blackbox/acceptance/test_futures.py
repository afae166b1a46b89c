"""How results come back: held polls, failures, repeats, sizes first, restarts."""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, datum, random_tokens, train_one_step
from tests.blackbox.sampling import sample, tokens_of
from tests.blackbox.servers import free_port, serve
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
    return wire.result(wire.promise("create_model", create))["model_id"]


@pytest.fixture
def sampler(wire: Wire, session: str) -> str:
    create = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    return wire.post("create_sampling_session", create).json()["sampling_session_id"]


@pytest.fixture
def background() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def retrieve(wire: Wire, ticket: str, **more: bool) -> httpx.Response:
    return wire.post("retrieve_future", {"request_id": ticket, **more})


def sample_of(sampler: str, seq: int, **more: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": random_tokens(5, seed=1)}]},
        "sampling_params": {"max_tokens": 3, "stop": []},
        **more,
    }


def log_lines(service: LocalService) -> list[dict[str, Any]]:
    lines = (service.data_dir / "server.log").read_text().splitlines()
    return [cast(dict[str, Any], json.loads(line)) for line in lines if line.startswith("{")]


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


# ---- held polls


def test_81_a_poll_is_held_until_there_is_a_result(
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


def completions(wire: Wire, sampler: str, cursor: int = 0, **more: Any) -> dict[str, Any]:
    target: dict[str, Any] = {
        "type": "sampling_session",
        "sampling_session_id": sampler,
        "cloned_sampler_id": 0,
    }
    body: dict[str, Any] = {"target": target, "prev_cursor": cursor, "retrieved_request_ids": []}
    answer = wire.post("retrieve_futures", {**body, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_81_a_poll_for_many_results_is_held_until_there_is_one(
    wire: Wire, sampler: str, background: ThreadPoolExecutor
) -> None:
    seen = completions(wire, sampler, timeout=0.0)
    assert seen["completions"] == []
    poll = background.submit(completions, wire, sampler, seen["cursor"])
    with pytest.raises(TimeoutError):
        poll.result(timeout=2)
    ticket = wire.promise("asample", sample_of(sampler, 0))
    answer = poll.result()
    (only,) = answer["completions"]
    assert only["state"] == "finished"
    assert only["request_id"] == ticket
    size = len(wire.wait(ticket).content)
    assert only["response_payload_uncompressed_size"] >= size
    # It is told again until the client asks from behind it.
    again = completions(wire, sampler, seen["cursor"], timeout=0.0)
    assert again == answer
    assert completions(wire, sampler, answer["cursor"], timeout=0.0)["completions"] == []


def test_81_polls_for_many_results_tell_failures_and_keep_clones_apart(
    wire: Wire, sampler: str, service: LocalService
) -> None:
    cursor = completions(wire, sampler, timeout=0.0)["cursor"]
    long: dict[str, Any] = {"sampling_params": {"max_tokens": 1900, "stop": []}, "num_samples": 8}
    cancelled = wire.promise("asample", sample_of(sampler, 1, **long))
    wire.post("cancel_future", {"request_id": cancelled})
    done = wire.promise("asample", sample_of(sampler, 3 * 10**9 + 1))
    wire.wait(done)
    failed = completions(wire, sampler, cursor)["completions"]
    assert failed == [{"state": "failed", "request_id": cancelled}]
    target = {"sampling_session_id": sampler, "cloned_sampler_id": 3}
    other = wire.post("retrieve_futures", {"target": target}).json()["completions"]
    assert [one["request_id"] for one in other] in ([], [done])  # fetched already, perhaps told
    with Wire(service.url, OTHER_KEY) as stranger:
        assert stranger.post("retrieve_futures", {"target": target}).status_code == 404


# ---- failures


def test_82_a_failed_future_is_no_failed_poll(client: tinker.ServiceClient, wire: Wire) -> None:
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


# ---- repeats


def test_83_a_result_can_be_read_again(wire: Wire, run: str, service: LocalService) -> None:
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


def test_83_a_result_that_a_client_says_to_have_can_be_read_again(wire: Wire, sampler: str) -> None:
    ticket = wire.promise("asample", sample_of(sampler, 0))
    first = wire.wait(ticket)
    completions(wire, sampler, timeout=0.0, retrieved_request_ids=[ticket, "none"])
    assert wire.wait(ticket).content == first.content


@pytest.mark.parametrize("ticket", ["none", "0" * 24, "../results/x", "x" * 256])
def test_84_an_unknown_future_is_not_found(wire: Wire, ticket: str) -> None:
    for allow in (False, True):
        answer = retrieve(wire, ticket, allow_metadata_only=allow)
        assert answer.status_code == 404
        assert "There is no request" in answer.json()["detail"]


def test_84_another_tenants_future_is_not_found(
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


def test_84_a_sampler_that_is_not_there_is_not_polled_for(wire: Wire) -> None:
    target = {"sampling_session_id": "none", "cloned_sampler_id": 0}
    assert wire.post("retrieve_futures", {"target": target}).status_code == 404
    for nonsense in (
        {"target": {"sampling_session_id": "none", "cloned_sampler_id": -1}},
        {"target": {"type": "training", "sampling_session_id": "none"}},
        {"target": target, "timeout": -1},
        {"target": target, "retrieved_request_ids": [""]},
        {},
    ):
        answer = wire.post("retrieve_futures", nonsense)
        assert answer.status_code == 400
        assert int(answer.headers["content-length"]) > 0


# ---- sizes first


def test_85_a_size_comes_first_only_to_who_asks_for_it(wire: Wire, sampler: str) -> None:
    wish = {
        "topk_prompt_logprobs": 1000,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": random_tokens(300, seed=1)}]},
    }
    large = wire.promise("asample", sample_of(sampler, 0, **wish))
    content = wire.wait(large).content
    assert len(content) > 2**20
    accept = {"accept": PROTOBUF, "content-type": "application/json"}

    def poll(ticket: str, **more: bool) -> httpx.Response:
        body = json.dumps({"request_id": ticket, **more}).encode()
        return wire.send("retrieve_future", body, accept)

    told = poll(large, allow_metadata_only=True).json()
    assert told["status"] == "complete_metadata"
    assert told["response_payload_size"] == pytest.approx(len(content), rel=0.1)
    for more in ({}, {"allow_metadata_only": False}):
        assert poll(large, **more).content == content
    small = wire.promise("asample", sample_of(sampler, 1))
    wire.wait(small)
    assert poll(small, allow_metadata_only=True).headers["content-type"] == PROTOBUF


def test_85_a_large_result_reaches_its_client(client: tinker.ServiceClient) -> None:
    base = client.create_sampling_client(base_model=MODEL).result()
    response = sample(
        base,
        random_tokens(300, seed=1),
        max_tokens=1,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=1000,
    ).result()
    assert response.topk_prompt_logprobs is not None
    assert len(response.topk_prompt_logprobs) == 300


# ---- restarts


@pytest.mark.timeout(180)
def test_86_polls_go_on_with_the_next_server(model_folder: Path, tmp_path: Path) -> None:
    """Those for one result and those for many; and what had ended before is told again."""
    port = free_port()
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"multiplex_polls": True}))
    options = ["--model", f"{MODEL}={model_folder}", "--port", str(port), "--dtype", "float32"]
    options += ["--data-dir", str(tmp_path / "data"), "--api-key", KEY, "--config", str(config)]
    params: dict[str, Any] = {"max_tokens": 500, "seed": 1, "stop": []}
    with serve(*options, log=tmp_path / "log") as first, Wire(first.url, KEY) as wire:
        client = tinker.ServiceClient(base_url=first.url, api_key=KEY)
        run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        sampler = run.save_weights_and_get_sampling_client().result()
        (expected,) = tokens_of(sample(sampler, max_tokens=50, seed=1, stop=[]))
        known, tickets, cursor = three_samples(wire)
        samples = [sample(sampler, num_samples=8, **params) for _ in range(2)]
        work = [datum(random_tokens(513, seed=i)) for i in range(4)]
        training = [run.forward_backward(work, "cross_entropy") for _ in range(6)]
        training[0].result()
        assert not training[-1].future().done()
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(10)
    with serve(*options, log=tmp_path / "log"), Wire(first.url, KEY) as wire:
        answer = completions(wire, known, cursor)
        assert answer["cursor"] > cursor
        assert {one["request_id"] for one in answer["completions"]} == tickets
        for future in samples:
            tokens = tokens_of(future)
            assert [len(one) for one in tokens] == [500] * 8
            assert tokens[0][:50] == expected
        losses = [future.result().metrics["loss:sum"] for future in training]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
        client.close("success").result()


def three_samples(wire: Wire) -> tuple[str, set[str], int]:
    """A sampler with three, which the client knows to be done and has not fetched."""
    session = wire.post("create_session", {}).json()["session_id"]
    create = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("create_sampling_session", create).json()["sampling_session_id"]
    tickets = {wire.promise("asample", sample_of(sampler, seq)) for seq in range(3)}
    told = set[str]()
    cursor = 0
    while told != tickets:
        answer = completions(wire, sampler, cursor)
        cursor = answer["cursor"]
        told |= {one["request_id"] for one in answer["completions"]}
    return sampler, tickets, cursor


# ---- errors


def test_87_errors_are_whole_and_plain(wire: Wire, run: str, session: str) -> None:
    """The SDK takes a 400 without a length, or a compressed one, for a proxy's glitch."""
    create: dict[str, Any] = {
        "session_id": session,
        "model_seq_id": 1,
        "base_model": "none",
        "lora_config": {},
    }
    headers = {"content-type": "application/json", "accept-encoding": "gzip, deflate, zstd"}
    for path, body, status in (
        ("create_model", create, 400),
        ("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {"beta1": 2}}, 400),
        ("optim_step", {"model_id": "none", **STEP}, 404),
        ("save_weights", {"model_id": run, "path": ""}, 400),
        ("asample", {}, 400),
        ("retrieve_future", {}, 400),
        ("retrieve_futures", {}, 400),
        ("cancel_future", {}, 400),
        ("join_sampling_session", {}, 400),
        ("join_sampling_session", {"sampling_session_id": "none"}, 404),
    ):
        answer = wire.send(path, json.dumps(body).encode(), headers)
        assert answer.status_code == status
        assert int(answer.headers["content-length"]) == len(answer.content) > 0
        assert not {"content-encoding", "transfer-encoding"} & answer.headers.keys()
        assert isinstance(answer.json()["detail"], str)


def test_88_no_mistake_is_answered_in_a_way_that_is_repeated(
    service: LocalService, wire: Wire, run: str, session: str, sampler: str
) -> None:
    """Neither these nor those of any test before: the SDK would go on repeating it for minutes."""
    place = {"model_id": run, "seq_id": 1}
    unknown_path = f"tinker://{run}/weights/none"
    checkpoint = f"training_runs/{run}/checkpoints/weights/none"
    mistakes: list[tuple[str, str, dict[str, Any] | None]] = [
        ("POST", "create_model", {"session_id": session, "model_seq_id": 1, "base_model": "none"}),
        ("POST", "create_model", {"session_id": "none", "model_seq_id": 0, "base_model": MODEL}),
        ("POST", "get_info", {"model_id": "none"}),
        ("POST", "optim_step", {**place, "adam_params": {"beta1": 2}}),
        ("POST", "optim_step", {**place, "adam_params": {"learning_rate": "x"}}),
        ("POST", "save_weights", {**place, "path": "/"}),
        ("POST", "save_weights", {**place, "path": "x", "ttl_seconds": 1}),
        ("POST", "save_weights_for_sampler", place),
        ("POST", "save_weights_for_sampler", {**place, "path": "x", "kind": "other"}),
        ("POST", "load_weights", {**place, "path": unknown_path}),
        ("POST", "load_weights", {**place, "path": "file:///etc/passwd"}),
        ("POST", "weights_info", {"tinker_path": unknown_path}),
        ("POST", "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 9}),
        ("POST", "asample", sample_of("none", 0)),
        ("POST", "asample", sample_of(sampler, 0, num_samples=0)),
        ("POST", "asample", sample_of(sampler, 0, sampling_params={"temperature": -1})),
        ("POST", "asample", sample_of(sampler, 0, prompt={"chunks": []})),
        ("POST", "asample", sample_of(sampler, 2**63)),
        ("POST", "join_sampling_session", {"sampling_session_id": "none"}),
        ("POST", "retrieve_future", {"request_id": "none"}),
        ("POST", "retrieve_futures", {"target": {"sampling_session_id": "none"}}),
        ("POST", "cancel_future", {"request_id": "none"}),
        ("POST", "session_heartbeat", {"session_id": "none"}),
        ("POST", "sessions/none/finish", {"reason": {"type": "success"}}),
        ("GET", "samplers/none", None),
        ("GET", "sessions/none", None),
        ("GET", "training_runs/none", None),
        ("GET", "training_runs?limit=-1", None),
        ("DELETE", checkpoint, None),
        ("PUT", f"{checkpoint}/ttl", {"ttl_seconds": 5}),
        ("POST", f"{checkpoint}/publish", None),
    ]
    for method, path, body in mistakes:
        answer = wire.request(method, path, json=body)
        assert answer.status_code in {400, 404, 422}, (path, body, answer.text)
    # Twinkle's routes say 409 where HTTP means it; their clients repeat nothing.
    requests = [line for line in log_lines(service) if line["event"] == "request"]
    requests = [line for line in requests if "/twinkle/" not in line["path"]]
    assert len(requests) >= len(mistakes)
    repeated = [r for r in requests if r["status"] in {408, 409, 429} or r["status"] >= 500]
    assert repeated == []
