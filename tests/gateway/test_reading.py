"""Bodies and addresses that no database takes, and large values taken to pieces."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from tests.gateway.test_codec_proto import TARGETS, one_datum, sdk_body
from tests.gateway.test_limits import PROTO
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.reading import let_go, size_of


@pytest.mark.parametrize(
    "content",
    [
        rb'{"request_id": "a\u0000b"}',
        rb'{"request_id": "a", "more": [{"\u0000": 1}]}',
        rb'{"more": {"deep": ["\u0000"]}, "request_id": "a"}',
    ],
)
async def test_null_characters_are_refused(client: httpx.AsyncClient, content: bytes) -> None:
    answer = await client.post("/retrieve_future", content=content)
    assert answer.status_code == 400
    assert "U+0000" in answer.json()["detail"]


async def test_what_only_looks_like_a_null_character_is_taken(client: httpx.AsyncClient) -> None:
    answer = await client.post("/retrieve_future", content=rb'{"request_id": "\\u0000"}')
    assert answer.status_code == 404


@pytest.mark.parametrize("address", ["/sessions/a%00b", "/sessions?limit=%00", "/samplers/%00"])
async def test_null_characters_in_addresses_are_refused(
    client: httpx.AsyncClient, address: str
) -> None:
    answer = await client.get(address)
    assert answer.status_code == 400
    assert "U+0000" in answer.json()["detail"]


async def test_null_characters_in_protobuf_are_refused(client: httpx.AsyncClient) -> None:
    body = sdk_body(one_datum(target_tokens=TARGETS), run="a\0b")
    answer = await client.post("/forward_backward", content=body, headers=PROTO)
    assert answer.status_code == 400


def test_large_values_are_taken_to_pieces() -> None:
    numbers, texts = [1, 2], ["a"]
    value: dict[str, Any] = {"data": [{"tokens": numbers, "texts": texts}], "seq_id": 1}
    data = value["data"]
    let_go(value, [object()])
    assert value == {}
    assert data == numbers == texts == []


@pytest.mark.parametrize(("encoding", "size"), [(b"", 4), (b"identity", 4), (b"zstd", 1000)])
async def test_a_compressed_body_counts_as_a_large_one(encoding: bytes, size: int) -> None:
    app = FastAPI()
    app.state.config = GatewayConfig(max_decoded_bytes=1000)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"abcd"}

    headers = [(b"content-encoding", encoding)]
    scope: dict[str, Any] = {"type": "http", "headers": headers, "app": app}
    assert await size_of(Request(scope, receive)) == size
