"""No route is open by mistake."""

import re

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from tests.gateway.in_memory import KEY

OPEN = {("GET", "/api/v1/healthz"), ("GET", "/api/v1/twinkle/healthz")}
# Fetched without a key by whoever has a signed URL.
SIGNED = {("GET", "/api/v1/downloads/{checkpoint}/{file}"), ("GET", "/api/v1/traces/{session}")}


def every_route(app: FastAPI) -> set[tuple[str, str]]:
    return {
        (method, context.path)
        for context in iter_route_contexts(app.routes)
        for method in context.methods or ()
        if context.path is not None
    }


async def test_every_route_but_the_listed_asks_for_a_key(app: FastAPI) -> None:
    routes = every_route(app)
    assert len(routes) > 40
    assert routes >= OPEN | SIGNED
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for method, path in sorted(routes):
            url = re.sub(r"\{\w+(:path)?\}", "x", path)
            for headers in (
                {},
                {"x-api-key": "tml-wrong"},
                {"authorization": "Bearer tml-wrong"},
                {"twinkle-authorization": "Bearer tml-wrong", "authorization": f"Bearer {KEY}"},
            ):
                response = await client.request(method, url, headers=headers)
                expected = 200 if (method, path) in OPEN else 401
                expected = 403 if (method, path) in SIGNED else expected
                assert response.status_code == expected, (method, path)


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
async def test_there_are_no_documentation_pages(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"http://gateway{path}")).status_code == 404
