"""The server on a real socket."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import structlog

from tests.gateway.in_memory import KEY, InMemoryService
from twinkle_dask.errors import StartupError
from twinkle_dask_gateway.app import create_app
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.server import bind, serve_http

HEADERS = {"x-api-key": KEY}


@asynccontextmanager
async def serving(
    world: InMemoryService, config: GatewayConfig
) -> AsyncGenerator[tuple[int, asyncio.Event]]:
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    app = create_app(world.service, config)
    serve = asyncio.create_task(
        serve_http(app, config, bind(config), started=port.set_result, stop=stop)
    )
    try:
        yield await port, stop
    finally:
        stop.set()
        await asyncio.wait_for(serve, 3)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


async def test_a_stopping_server_lets_polls_go_at_once(world: InMemoryService) -> None:
    config = GatewayConfig(port=0, url_prefix="/a/b")
    async with serving(world, config) as (port, stop), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/a/b/api/v1"
        assert (await client.get(f"{url}/healthz")).json() == {"status": "ok"}
        poll = asyncio.create_task(
            client.post(f"{url}/retrieve_future", json={"request_id": "held"}, headers=HEADERS)
        )
        await until(lambda: world.open_waits == 1)
        stop.set()
        response = await asyncio.wait_for(poll, 2)
        assert response.status_code == 408
    assert world.open_waits == 0


async def test_a_client_that_leaves_is_not_waited_for(world: InMemoryService) -> None:
    config = GatewayConfig(port=0)
    async with serving(world, config) as (port, _), httpx.AsyncClient() as client:
        poll = asyncio.create_task(
            client.post(
                f"http://127.0.0.1:{port}/api/v1/retrieve_future",
                json={"request_id": "held"},
                headers=HEADERS,
            )
        )
        await until(lambda: world.open_waits == 1)
        poll.cancel()
        await until(lambda: world.open_waits == 0)


def test_answers_are_not_delayed_by_the_kernel() -> None:
    # asyncio sets TCP_NODELAY where the listener names its protocol; without it the body of each
    # answer waits about 40 ms for the acknowledgement of its headers.
    with bind(GatewayConfig(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*in use"):
            bind(GatewayConfig(port=port))


@pytest.mark.parametrize(
    "config", [GatewayConfig(host="no.such.host.invalid"), GatewayConfig(port=70000)]
)
def test_an_impossible_address_is_named(config: GatewayConfig) -> None:
    with pytest.raises(StartupError, match=f"{config.host}:{config.port}"):
        bind(config)


def test_a_prefix_is_a_path() -> None:
    with pytest.raises(ValueError, match="url_prefix"):
        GatewayConfig(url_prefix="a/")


async def test_a_log_line_is_about_its_own_request(world: InMemoryService) -> None:
    """Also on a connection that was paused while a large body arrived."""
    config = GatewayConfig(port=0, max_body_bytes=10_000_000)
    merge = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=merge) as lines:
        async with serving(world, config) as (port, _), httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{port}/api/v1"
            large = {"model_id": "large", "seq_id": 1, "pad": "x" * 1_000_000}
            refused = await client.post(f"{url}/optim_step", json=large, headers=HEADERS)
            assert refused.status_code == 400
            assert (await client.get(f"{url}/sessions", headers=HEADERS)).status_code == 200
    first, second = (line for line in lines if line["event"] == "request")
    assert (first["status"], first["run"]) == (400, "large")
    assert "pad" in first["error"]
    assert second["status"] == 200
    assert not {"run", "error"} & second.keys()
