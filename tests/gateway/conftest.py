"""The app over a service that computes nothing, and a client without a socket."""

from collections.abc import AsyncGenerator

import httpx
import pytest
import structlog
from fastapi import FastAPI

from tests.gateway.in_memory import KEY, MODEL, InMemoryService
from twinkle_dask_gateway.app import create_app
from twinkle_dask_gateway.config import GatewayConfig


@pytest.fixture
def world() -> InMemoryService:
    return InMemoryService()


@pytest.fixture
def config() -> GatewayConfig:
    # Small limits, so that a test reaches them with little.
    return GatewayConfig(
        max_body_bytes=100_000, max_decoded_bytes=200_000, max_data=300, poll_s=0.05
    )


@pytest.fixture
def app(world: InMemoryService, config: GatewayConfig) -> FastAPI:
    return create_app(world.service, config)


@pytest.fixture
async def client(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    headers = {"x-api-key": KEY}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway/api/v1", headers=headers
    ) as client:
        yield client
    structlog.contextvars.clear_contextvars()  # here requests share the test's context


@pytest.fixture
async def run(client: httpx.AsyncClient) -> str:
    """A run of a session of its own, ready for work."""
    session = (await client.post("/create_session", json={})).json()["session_id"]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": MODEL,
        "lora_config": {"rank": 8},
    }
    promise = await client.post("/create_model", json=body)
    assert promise.status_code == 200
    return f"{session}:train:0"


@pytest.fixture
async def sampler(client: httpx.AsyncClient, run: str) -> str:
    """A sampler of the base model."""
    body = {
        "session_id": run.split(":")[0],
        "sampling_session_seq_id": 0,
        "base_model": MODEL,
    }
    return (await client.post("/create_sampling_session", json=body)).json()["sampling_session_id"]
