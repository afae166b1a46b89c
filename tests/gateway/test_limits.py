"""Bodies: their size, their compression, their kind."""

from collections.abc import AsyncIterator

import httpx
import pytest
import zstandard

from tests.gateway.in_memory import InMemoryService
from tests.gateway.test_codec_proto import TARGETS, one_datum, sdk_body

PROTO = {"content-type": "application/x-protobuf"}
ZSTD = PROTO | {"content-encoding": "zstd"}


async def test_a_body_that_says_it_is_too_large(client: httpx.AsyncClient) -> None:
    response = await client.post("/create_session", content=b" " * 100_001)
    assert response.status_code == 413
    assert "MiB" in response.json()["detail"]


async def test_a_body_that_turns_out_too_large(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b" " * 10_000

    response = await client.post("/create_session", content=endless())
    assert response.status_code == 413
    assert sent < 200_000


async def test_zstd_of_any_size_announced_or_not(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    body = sdk_body(*[one_datum(target_tokens=TARGETS)] * 300, run=run)
    for compressor in (
        zstandard.ZstdCompressor(),
        zstandard.ZstdCompressor(write_content_size=False),
    ):
        packed = compressor.compress(body)
        response = await client.post("/forward_backward", content=packed, headers=ZSTD)
        assert response.status_code == 200, response.text
        assert len(world.called("forward_backward")["batch"].data) == 300


async def test_a_batch_of_too_many_data(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    body = sdk_body(*[one_datum(target_tokens=TARGETS)] * 301, run=run)
    response = await client.post("/forward_backward", content=body, headers=PROTO)
    assert response.status_code == 400
    assert "more than 300 data" in response.json()["detail"]
    old = {"model_id": run, "seq_id": 3, "forward_input": {"data": [1] * 301, "loss_fn": "x"}}
    response = await client.post("/forward", json=old)
    assert response.status_code == 400
    assert "more than 300 data" in response.json()["detail"]
    assert world.refused == [(run, 3)]


def bomb() -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(b"\0" * 50_000_000)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (bomb(), "unpacks to more than"),
        (zstandard.ZstdCompressor().compress(b"abc" * 1000)[:-4], "not complete"),
        (zstandard.ZstdCompressor().compress(b"abc") + b"more", "after the end"),
        (zstandard.ZstdCompressor().compress(b"abc") + b"m" * 5000, "after the end"),
        (b"not zstd at all", "no valid zstd"),
        (b"", "not complete"),
    ],
    ids=["bomb", "truncated", "trailing", "much trailing", "garbage", "empty"],
)
async def test_bad_zstd(client: httpx.AsyncClient, body: bytes, says: str) -> None:
    response = await client.post("/forward_backward", content=body, headers=ZSTD)
    assert response.status_code == 400
    assert says in response.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"content-type": "text/plain"}, "text/plain"),
        ({"content-type": "application/x-www-form-urlencoded"}, "urlencoded"),
        (PROTO | {"content-encoding": "gzip"}, "gzip"),
        (PROTO | {"content-encoding": "br, zstd"}, "br, zstd"),
    ],
)
async def test_wrong_kinds_of_body(
    client: httpx.AsyncClient, headers: dict[str, str], says: str
) -> None:
    response = await client.post("/forward_backward", content=b"{}", headers=headers)
    assert response.status_code == 400
    assert says in response.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{}{}"])
async def test_bad_json(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/optim_step", content=body)
    assert response.status_code == 400
    assert "body" in response.json()["detail"]
