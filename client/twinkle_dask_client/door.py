"""The only places that do I/O: how a call is sent, again if it may be, within a session."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx

from twinkle_dask_client.calls import service as service_calls
from twinkle_dask_client.calls.base import Call, R
from twinkle_dask_client.errors import ClientError, NotConfigured, Unreachable, error_for
from twinkle_dask_client.heartbeat import AsyncHeartbeat, Heartbeat
from twinkle_dask_client.progress import Display
from twinkle_dask_client.retrying import Attempts, RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"
SESSION = "x-twinkle-session-id"
#: A training call answers when the work is done, which waits its turn among other tenants'.
_WORK_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class ServiceAddress:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How this client's session is kept.

    Attributes:
        heartbeat_s: Between two heartbeats.
    """

    metadata: Mapping[str, Any]
    heartbeat_s: float


class Door:
    """Sends calls and waits for the answers. Several threads may use one."""

    def __init__(
        self,
        address: ServiceAddress,
        *,
        timeout_s: float,
        retry: RetryPolicy,
        session: SessionSettings,
        display: Display,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.url = str(address.base_url)
        self.display = display
        self._timeout_s = timeout_s
        self._retry = retry
        self._settings = session
        self._opening = threading.Lock()
        self._session: str | None = None
        self._heart: Heartbeat | None = None
        self._http = httpx.Client(
            base_url=address.base_url,
            headers=address.headers,
            timeout=timeout_s,
            transport=transport,
        )

    def ask(self, call: Call[R]) -> R:
        """The answer to a call that needs no session."""
        return call.read(self._send(call, {}))

    def ask_in_session(self, call: Call[R]) -> R:
        """The answer to a call of this client's session, which is opened for the first one.

        Raises:
            SessionLost: The service has ended it.
        """
        with self.display.waiting(call.doing):
            return call.read(self._send(call, self.session()))

    def session(self) -> dict[str, str]:
        """The header that names the session; opens it if need be."""
        with self._opening:
            if self._session is None:
                made = self.ask(service_calls.create_session(self._settings.metadata)).session_id
                beat_s = self._settings.heartbeat_s
                beat = service_calls.heartbeat(made, timeout_s=max(1.0, beat_s))
                self._session, self._heart = made, Heartbeat(lambda: self.ask(beat), beat_s)
        if self._heart is not None and self._heart.lost is not None:
            raise self._heart.lost
        return {SESSION: self._session}

    @contextmanager
    def lines(self, call: Call[Any]) -> Generator[Generator[str]]:
        """The lines of an answer as they arrive. Never sent again."""
        timeout = httpx.Timeout(self._timeout_s, read=_WORK_TIMEOUT_S)
        try:
            with self._http.stream(
                call.method, call.path, json=call.body, headers=self.session(), timeout=timeout
            ) as response:
                if not response.is_success:
                    response.read()
                    raise error_for(response)
                yield (line for line in response.iter_lines() if line)
        except httpx.RequestError as error:
            raise Unreachable(f"The answer broke off: {error}") from error

    @contextmanager
    def download(self, path: str) -> Generator[httpx.Response]:
        """A file; its body is read by the caller."""
        try:
            with self._http.stream("GET", path, follow_redirects=True) as response:
                if not response.is_success:
                    response.read()
                    raise error_for(response)
                yield response
        except httpx.RequestError as error:
            raise Unreachable(f"The download broke off: {error}") from error

    def close(self) -> None:
        """End the session, so that what it holds is free at once, and close the connections."""
        if self._heart is not None:
            self._heart.stop()
        if self._session is not None and (self._heart is None or self._heart.lost is None):
            # One that cannot be told so ends by itself.
            with contextlib.suppress(ClientError):
                self.ask(service_calls.finish_session(self._session))
        self._http.close()

    def _send(self, call: Call[Any], headers: Mapping[str, str]) -> httpx.Response:
        attempts = Attempts(call, self._retry)
        while True:
            try:
                response = self._http.request(
                    call.method,
                    call.path,
                    params=dict(call.params),
                    json=call.body,
                    headers=headers,
                    timeout=_timeout_s(call, self._timeout_s),
                )
            except httpx.RequestError as error:
                pause_s = attempts.after_error(error)
            else:
                pause_s = attempts.after_reply(response)
                if pause_s is None:
                    return response
            time.sleep(pause_s)


class AsyncDoor:
    """``Door`` with ``await``; for one event loop."""

    def __init__(
        self,
        address: ServiceAddress,
        *,
        timeout_s: float,
        retry: RetryPolicy,
        session: SessionSettings,
        display: Display,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self.url = str(address.base_url)
        self.display = display
        self._timeout_s = timeout_s
        self._retry = retry
        self._settings = session
        self._opening = asyncio.Lock()
        self._session: str | None = None
        self._heart: AsyncHeartbeat | None = None
        self._http = httpx.AsyncClient(
            base_url=address.base_url,
            headers=address.headers,
            timeout=timeout_s,
            transport=transport,
        )

    async def ask(self, call: Call[R]) -> R:
        """See ``Door.ask``."""
        return call.read(await self._send(call, {}))

    async def ask_in_session(self, call: Call[R]) -> R:
        """See ``Door.ask_in_session``."""
        with self.display.waiting(call.doing):
            return call.read(await self._send(call, await self.session()))

    async def session(self) -> dict[str, str]:
        """See ``Door.session``."""
        async with self._opening:
            if self._session is None:
                opened = await self.ask(service_calls.create_session(self._settings.metadata))
                made, beat_s = opened.session_id, self._settings.heartbeat_s
                beat = service_calls.heartbeat(made, timeout_s=max(1.0, beat_s))
                self._session, self._heart = made, AsyncHeartbeat(lambda: self.ask(beat), beat_s)
        if self._heart is not None and self._heart.lost is not None:
            raise self._heart.lost
        return {SESSION: self._session}

    @asynccontextmanager
    async def lines(self, call: Call[Any]) -> AsyncGenerator[AsyncGenerator[str]]:
        """See ``Door.lines``."""
        timeout = httpx.Timeout(self._timeout_s, read=_WORK_TIMEOUT_S)
        session = await self.session()
        try:
            async with self._http.stream(
                call.method, call.path, json=call.body, headers=session, timeout=timeout
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise error_for(response)
                yield (line async for line in response.aiter_lines() if line)
        except httpx.RequestError as error:
            raise Unreachable(f"The answer broke off: {error}") from error

    @asynccontextmanager
    async def download(self, path: str) -> AsyncGenerator[httpx.Response]:
        """See ``Door.download``."""
        try:
            async with self._http.stream("GET", path, follow_redirects=True) as response:
                if not response.is_success:
                    await response.aread()
                    raise error_for(response)
                yield response
        except httpx.RequestError as error:
            raise Unreachable(f"The download broke off: {error}") from error

    async def close(self) -> None:
        """See ``Door.close``."""
        if self._heart is not None:
            await self._heart.stop()
        if self._session is not None and (self._heart is None or self._heart.lost is None):
            with contextlib.suppress(ClientError):
                await self.ask(service_calls.finish_session(self._session))
        await self._http.aclose()

    async def _send(self, call: Call[Any], headers: Mapping[str, str]) -> httpx.Response:
        attempts = Attempts(call, self._retry)
        while True:
            try:
                response = await self._http.request(
                    call.method,
                    call.path,
                    params=dict(call.params),
                    json=call.body,
                    headers=headers,
                    timeout=_timeout_s(call, self._timeout_s),
                )
            except httpx.RequestError as error:
                pause_s = attempts.after_error(error)
            else:
                pause_s = attempts.after_reply(response)
                if pause_s is None:
                    return response
            await asyncio.sleep(pause_s)


def _timeout_s(call: Call[Any], usual_s: float) -> float:
    """Longest silence: what the call says, or the usual one unless it waits for work."""
    if call.timeout_s is not None:
        return call.timeout_s
    return max(usual_s, _WORK_TIMEOUT_S) if call.doing else usual_s
