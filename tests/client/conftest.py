"""Replies are shaped with httpx's MockTransport; each test runs against both services."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

import httpx
import pytest

from twinkle_dask_client import AsyncService, Capabilities, RetryPolicy, RunInfo, RunPage, Service

Handler = Callable[[httpx.Request], httpx.Response]


class Asking(Protocol):
    """What both services can be asked, without await."""

    def health(self) -> None: ...
    def capabilities(self) -> Capabilities: ...
    def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage: ...
    def iter_runs(self, *, page_size: int = 100) -> Iterator[RunInfo]: ...


class Awaited:
    """An ``AsyncService`` whose answers are waited for."""

    def __init__(self, service: AsyncService, runner: asyncio.Runner) -> None:
        self._service = service
        self._run = runner.run

    def health(self) -> None:
        self._run(self._service.health())

    def capabilities(self) -> Capabilities:
        return self._run(self._service.capabilities())

    def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage:
        return self._run(self._service.runs(limit=limit, offset=offset))

    def iter_runs(self, *, page_size: int = 100) -> Iterator[RunInfo]:
        async def collect() -> list[RunInfo]:
            return [run async for run in self._service.iter_runs(page_size=page_size)]

        return iter(self._run(collect()))


class Connect(Protocol):
    def __call__(self, handler: Handler, *, attempts: int = 3) -> Asking: ...


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Gives a service whose requests are answered by a handler, with short pauses."""
    with asyncio.Runner() as runner:
        opened: list[Service | AsyncService] = []

        def connect(handler: Handler, *, attempts: int = 3) -> Asking:
            retry = RetryPolicy(attempts=attempts, first_pause_s=0.001)
            transport = httpx.MockTransport(handler)
            url, key = "http://service.test/prefix/", "tml-key"
            if request.param == "sync":
                service = Service(url, api_key=key, retry=retry, transport=transport)
                opened.append(service)
                return service
            twin = AsyncService(url, api_key=key, retry=retry, transport=transport)
            opened.append(twin)
            return Awaited(twin, runner)

        yield connect
        for service in opened:
            if isinstance(service, Service):
                service.close()
            else:
                runner.run(service.close())
