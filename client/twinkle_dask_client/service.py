"""The two front doors. Each method names a call; each ``_ask`` is the only place that does I/O."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from twinkle_dask_client import calls
from twinkle_dask_client.calls import Call, R
from twinkle_dask_client.errors import NotConfigured
from twinkle_dask_client.models import Capabilities, Run, RunPage
from twinkle_dask_client.retrying import Attempts, RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class _Address:
    """Where to send, and as whom."""

    base_url: httpx.URL
    headers: dict[str, str]

    @classmethod
    def resolve(cls, url: str | None, api_key: str | None) -> Self:
        """What was given, or else what the environment says; an empty value counts as none."""
        url = url or os.environ.get("TWINKLE_DASK_URL") or DEFAULT_URL
        key = api_key or os.environ.get("TWINKLE_DASK_API_KEY")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise NotConfigured(f"{url!r} is no address: {error}.") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise NotConfigured(f"The address must begin with http:// or https://, not {url!r}.")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise NotConfigured("An API key has printable ASCII characters only.")
        headers = {"accept": "application/json", "user-agent": "twinkle-dask-client"}
        if key is not None:
            headers["x-api-key"] = key
        return cls(parsed.copy_with(path=parsed.path.rstrip("/") + "/api/v1/"), headers)


class Service:
    """A service as its tenant sees it. Use it in a ``with`` block, or ``close`` it.

    One instance may be used by several threads.

    Args:
        url: Address of the service; else ``TWINKLE_DASK_URL``, else ``http://127.0.0.1:8000``.
        api_key: The tenant's key; else ``TWINKLE_DASK_API_KEY``. ``health`` needs none.
        timeout_s: Longest silence within one attempt, in seconds.
        retry: How patient to be with a GET that failed for reasons which pass.
        transport: Another way to send, for tests.

    Raises:
        NotConfigured: The address or key cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = _Address.resolve(url, api_key)
        self.url = str(address.base_url)
        self._retry = retry
        self._http = httpx.Client(
            base_url=address.base_url,
            headers=address.headers,
            timeout=timeout_s,
            transport=transport,
        )

    def health(self) -> None:
        """Return if the service answers and is well.

        Raises:
            ClientError: It is not.
        """
        self._ask(calls.health())

    def capabilities(self) -> Capabilities:
        """The base models that are served."""
        return self._ask(calls.capabilities())

    def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage:
        """One page of this key's runs, the newest first.

        Args:
            limit: Runs in the page at most.
            offset: Runs to pass over; ``page.next_offset`` names the next page's.
        """
        return self._ask(calls.runs(limit=limit, offset=offset))

    def iter_runs(self, *, page_size: int = 100) -> Iterator[Run]:
        """All of this key's runs, the newest first, asked for page by page as they are used.

        A run that is made meanwhile moves the others down, so one of them may come twice.
        """
        offset: int | None = 0
        while offset is not None:
            page = self.runs(limit=page_size, offset=offset)
            yield from page.runs
            offset = page.next_offset

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, call: Call[R]) -> R:
        attempts = Attempts(call, self._retry)
        while True:
            try:
                response = self._http.request(call.method, call.path, params=dict(call.params))
            except httpx.RequestError as error:
                pause_s = attempts.after_error(error)
            else:
                pause_s = attempts.after_reply(response)
                if pause_s is None:
                    return call.read(response)
            time.sleep(pause_s)


class AsyncService:
    """``Service`` with ``await``; the arguments mean the same."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = _Address.resolve(url, api_key)
        self.url = str(address.base_url)
        self._retry = retry
        self._http = httpx.AsyncClient(
            base_url=address.base_url,
            headers=address.headers,
            timeout=timeout_s,
            transport=transport,
        )

    async def health(self) -> None:
        """See ``Service.health``."""
        await self._ask(calls.health())

    async def capabilities(self) -> Capabilities:
        """See ``Service.capabilities``."""
        return await self._ask(calls.capabilities())

    async def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage:
        """See ``Service.runs``."""
        return await self._ask(calls.runs(limit=limit, offset=offset))

    async def iter_runs(self, *, page_size: int = 100) -> AsyncIterator[Run]:
        """See ``Service.iter_runs``."""
        offset: int | None = 0
        while offset is not None:
            page = await self.runs(limit=page_size, offset=offset)
            for run in page.runs:
                yield run
            offset = page.next_offset

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(self, call: Call[R]) -> R:
        attempts = Attempts(call, self._retry)
        while True:
            try:
                response = await self._http.request(
                    call.method, call.path, params=dict(call.params)
                )
            except httpx.RequestError as error:
                pause_s = attempts.after_error(error)
            else:
                pause_s = attempts.after_reply(response)
                if pause_s is None:
                    return call.read(response)
            await asyncio.sleep(pause_s)
