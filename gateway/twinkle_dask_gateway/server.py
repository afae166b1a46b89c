"""uvicorn inside a loop and a process that are someone else's."""

import asyncio
import contextlib
import importlib
import importlib.util
import socket
from collections.abc import Callable, Generator
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twinkle_dask.errors import StartupError
from twinkle_dask_gateway.config import GatewayConfig

# The SDK's default transport keeps idle connections for 90 s. Closing them earlier than the client
# does makes some of its requests fail on a dying connection.
_KEEP_ALIVE_S = 120
# The most that requests in progress get when the server stops; held polls end at once.
_GRACE_S = 1
_MANY_FILES = 10_240


async def serve_http(
    app: FastAPI,
    config: GatewayConfig,
    listener: socket.socket,
    *,
    started: Callable[[int], None],
    stop: asyncio.Event,
) -> None:
    """Serve until ``stop`` is set; returns within about 1.5 s of that.

    Args:
        app: From ``create_app``.
        config: How to serve.
        listener: From ``bind``; closed at the end.
        started: Called once with the port, as soon as connections are accepted.
        stop: Ends the serving. To cancel the task instead would leave connections open.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            # The address of a client is in no log and no decision of ours.
            proxy_headers=False,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            backlog=config.backlog,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        ),
        started=lambda: started(listener.getsockname()[1]),
    )

    async def watch() -> None:
        await stop.wait()
        app.state.polls.end()
        server.should_exit = True

    watcher = asyncio.create_task(watch())
    _allow_many_files()
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        listener.close()


def bind(config: GatewayConfig) -> socket.socket:
    """Take the address. Connections are refused until the app is served.

    Raises:
        StartupError: It cannot be listened on, for example because the port is in use.
    """
    where = f"{config.host}:{config.port}"
    try:
        family, _, _, _, found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # getaddrinfo folds a port above 65535 into range; bind refuses it.
        address = (found[0], config.port, *found[2:])
        # With the protocol named, asyncio sets TCP_NODELAY on what it accepts; without it, every
        # answer waits up to 40 ms for the acknowledgement of its headers.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, OverflowError) as error:
        raise StartupError(f"Cannot listen on {where}: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise StartupError(
            f"Cannot listen on {where}: {error}. Choose another port, or 0 for a free one."
        ) from error
    return listener


def _allow_many_files() -> None:
    """Let this process have as many connections as the system permits.

    A client holds up to 2,000 polls; the usual limit of open files is 1,024.
    """
    if importlib.util.find_spec("resource") is None:  # on Windows, which has no such limit
        return
    resource = importlib.import_module("resource")
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says "no limit" and refuses to be asked for that.
    wanted = _MANY_FILES if most == resource.RLIM_INFINITY else most
    if resource.RLIM_INFINITY != now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose answers leave in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        gathering = _Gathering(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, gathering))


class _Gathering:
    """A transport that sends together what one turn of the loop writes.

    uvicorn writes the head of an answer and its body one after the other; sent so, each would be
    a packet of its own and wake the client for itself.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.writelines(parts)


class _Server(uvicorn.Server):
    """A server that leaves signals to its host and says when it listens."""

    def __init__(self, config: uvicorn.Config, *, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
