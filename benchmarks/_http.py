"""HTTP/1.1 by hand, so that the client costs little beside the gateway it measures."""

import asyncio
import json
import time
from typing import Any, Self
from urllib.parse import urlsplit


class Connection:
    """One kept-alive connection to a service."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: str, key: str
    ) -> None:
        self._reader, self._writer = reader, writer
        parts = urlsplit(url)
        self._prefix = parts.path
        self._head = f"host: {parts.netloc}\r\nx-api-key: {key}\r\n"

    @classmethod
    async def open(cls, url: str, key: str) -> Self:
        """Connect."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        return cls(reader, writer, url, key)

    async def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """One request, JSON unless the body is bytes; status and body of its answer."""
        content = body if isinstance(body, bytes) else b"" if body is None else _json(body)
        method = "GET" if body is None else "POST"
        sent = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        head = (
            f"{method} {self._prefix}/api/v1/{path} HTTP/1.1\r\n{self._head}{lines}"
            f"content-length: {len(content)}\r\n\r\n"
        )
        self._writer.writelines((head.encode(), content))
        await self._writer.drain()
        told = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(told.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(told[9:12]), await self._reader.readexactly(length)

    async def json(self, path: str, body: Any = None) -> Any:
        """The answer's JSON; anything but 200 ends the benchmark."""
        status, content = await self.ask(path, body)
        if status != 200:
            raise SystemExit(f"{path}: {status} {content[:300]!r}")
        return json.loads(content)

    async def result(self, request_id: str) -> Any:
        """A result, polled for as long as it takes."""
        while True:
            status, content = await self.ask("retrieve_future", {"request_id": request_id})
            if status == 200:
                return json.loads(content)

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        await self._writer.wait_closed()


async def hammer(
    url: str, key: str, path: str, body: Any, *, connections: int, seconds: float
) -> tuple[float, list[float]]:
    """Ask the same over and over; requests per second, and the ms that each took."""
    opened = [await Connection.open(url, key) for _ in range(connections)]
    taken_ms: list[float] = []
    until_s = time.perf_counter() + seconds

    async def one(connection: Connection) -> None:
        while (start_s := time.perf_counter()) < until_s:
            status, content = await connection.ask(path, body)
            if status != 200:
                raise SystemExit(f"{path}: {status} {content[:300]!r}")
            taken_ms.append((time.perf_counter() - start_s) * 1000)

    start_s = time.perf_counter()
    await asyncio.gather(*map(one, opened))
    rate = len(taken_ms) / (time.perf_counter() - start_s)
    for each in opened:
        await each.close()
    return rate, taken_ms


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()
