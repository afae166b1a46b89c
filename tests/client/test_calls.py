from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.client.conftest import Connect, Handler
from twinkle_dask_client import BadReply


def run_on_wire(number: int) -> dict[str, Any]:
    return {
        "training_run_id": f"s1:train:{number}",
        "base_model": "tiny",
        "model_owner": "t1",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": 8,
        "last_request_time": "2026-11-23T12:00:00Z",
        "last_checkpoint": {
            "checkpoint_id": "weights/ck1",
            "checkpoint_type": "training",
            "time": "2026-11-23T11:00:00+00:00",
            "tinker_path": f"tinker://s1:train:{number}/weights/ck1",
            "size_bytes": 12,
        },
        "last_sampler_checkpoint": None,
        "user_metadata": {"who": "me"},
        "a_field_of_a_newer_service": 1,
    }


def pages_of(count: int) -> Handler:
    def answer(request: httpx.Request) -> httpx.Response:
        limit, offset = (int(request.url.params[name]) for name in ("limit", "offset"))
        rows = [run_on_wire(number) for number in range(offset, min(offset + limit, count))]
        cursor = {"offset": offset, "limit": limit, "total_count": count}
        return httpx.Response(200, json={"training_runs": rows, "cursor": cursor})

    return answer


def test_requests_carry_key_and_prefix(connect: Connect) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"status": "ok"})

    connect(answer).health()
    assert str(seen[0].url) == "http://service.test/prefix/api/v1/healthz"
    assert seen[0].headers["x-api-key"] == "tml-key"


def test_capabilities(connect: Connect) -> None:
    models = [
        {"model_name": "a", "max_context_length": 512, "trainable": True, "sampleable": False},
        {"model_name": "b"},
    ]
    service = connect(lambda _: httpx.Response(200, json={"supported_models": models}))
    first, second = service.capabilities().models
    assert (first.name, first.context_length, first.trainable, first.sampleable) == (
        "a",
        512,
        True,
        False,
    )
    assert (second.name, second.context_length) == ("b", None)


def test_run_is_read_whole(connect: Connect) -> None:
    (run,) = connect(pages_of(1)).runs().runs
    assert run.id == "s1:train:0"
    assert run.owner == "t1"
    assert run.rank == 8
    assert run.last_request_at == datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert run.user_metadata == {"who": "me"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.address == "twinkle://s1:train:0/weights/ck1"
    assert run.last_sampler_checkpoint is None


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_iter_runs_meets_each_run_once(connect: Connect, count: int) -> None:
    ids = [run.id for run in connect(pages_of(count)).iter_runs(page_size=2)]
    assert ids == [f"s1:train:{number}" for number in range(count)]


def test_pages_name_the_next(connect: Connect) -> None:
    service = connect(pages_of(3))
    assert service.runs(limit=2).next_offset == 2
    assert service.runs(limit=2, offset=2).next_offset is None
    assert service.runs(limit=2, offset=9).next_offset is None  # past the end: empty, and the last


@pytest.mark.parametrize(("limit", "offset"), [(0, 0), (-1, 0), (1, -1)])
def test_page_bounds_are_checked_before_sending(connect: Connect, limit: int, offset: int) -> None:
    def never(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request)

    with pytest.raises(ValueError, match="limit must be at least 1"):
        connect(never).runs(limit=limit, offset=offset)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"status": "fine"}'])
def test_a_strange_body_is_a_bad_reply(connect: Connect, body: bytes) -> None:
    with pytest.raises(BadReply, match="healthz gave a reply that is no Health"):
        connect(lambda _: httpx.Response(200, content=body)).health()


def test_a_naive_time_is_a_bad_reply(connect: Connect) -> None:
    row = run_on_wire(0) | {"last_request_time": "2026-11-23T12:00:00"}
    cursor = {"offset": 0, "limit": 20, "total_count": 1}
    reply = httpx.Response(200, json={"training_runs": [row], "cursor": cursor})
    with pytest.raises(BadReply, match="last_request_time"):
        connect(lambda _: reply).runs()


def test_a_broken_encoding_is_a_bad_reply(connect: Connect) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip")
        )

    with pytest.raises(BadReply, match="cannot be decoded"):
        connect(answer).health()
