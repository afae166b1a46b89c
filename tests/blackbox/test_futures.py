"""How results come back, and how a client begins, keeps and ends a session."""

import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import pytest
import tinker

from tests.blackbox.conftest import MODEL, OTHER_KEY
from tests.blackbox.data import batch, datum, random_tokens
from tests.blackbox.wire import Wire
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


def test_a_result_of_numbers_is_protobuf_to_whoever_reads_it(wire: Wire, run: str) -> None:
    ticket = wire.forward_backward(run, 1, batch())
    wire.wait(ticket)
    assert retrieve(wire, ticket).headers["content-type"] == "application/json"
    metrics = retrieve(wire, ticket).json()["metrics"]
    assert metrics["loss:sum"] == pytest.approx(wire.metrics(ticket)["loss:sum"])
    assert all(name.count(":") == 1 for name in metrics)


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
