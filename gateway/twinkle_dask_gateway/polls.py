"""Long polls: wait for an outcome, but not for a client that left or a server that stops."""

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from twinkle_dask.errors import Saturated

_T = TypeVar("_T")

#: What somebody is told whose answer cannot be awaited.
STOPPING = "The service is stopping; ask again in a moment."


class Polls:
    """The polls in progress.

    A held poll would keep a stopping server waiting for up to half a minute, so ``end`` lets all
    of them go at once; the client polls again and finds the next server.
    """

    def __init__(self) -> None:
        self._waits: set[asyncio.Task[Any]] = set()
        self._ended = False

    async def wait(self, request: Request, outcome: Coroutine[Any, Any, _T]) -> _T | None:
        """Await ``outcome`` on behalf of a request whose body has been read.

        Returns:
            The outcome, or None if the client left or the server is stopping.
        """
        wait = asyncio.create_task(outcome)
        gone = asyncio.create_task(_disconnected(request))
        self._waits.add(wait)
        if self._ended:
            wait.cancel()
        try:
            await asyncio.wait({wait, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waits.discard(wait)
            gone.cancel()
            if wait.cancel():  # False where it is done already
                await asyncio.wait({wait})
        return None if wait.cancelled() else wait.result()

    async def answer(self, request: Request, outcome: Coroutine[Any, Any, _T]) -> _T:
        """Await ``outcome`` on behalf of a request that is answered by nothing else.

        Raises:
            ClientDisconnect: The client left.
            Saturated: The server is stopping.
        """
        found: list[_T] = []

        async def keep() -> bool:
            found.append(await outcome)
            return True

        if await self.wait(request, keep()):
            return found[0]
        raise Saturated(STOPPING) if self._ended else ClientDisconnect

    async def unless_stopping(self, outcome: Coroutine[Any, Any, _T]) -> _T:
        """Await ``outcome`` on behalf of an answer that has begun.

        Raises:
            Saturated: The server is stopping.
        """
        wait = asyncio.create_task(outcome)
        self._waits.add(wait)
        if self._ended:
            wait.cancel()
        try:
            await asyncio.wait({wait})
        finally:
            self._waits.discard(wait)
            wait.cancel()
        if wait.cancelled():
            raise Saturated(STOPPING)
        return wait.result()

    async def each(self, parts: AsyncGenerator[_T]) -> AsyncGenerator[_T]:
        """The parts of an answer, in order.

        Raises:
            Saturated: The server is stopping.
        """
        while (part := await self.unless_stopping(_next(parts))) is not None:
            yield part

    def end(self) -> None:
        """Let every poll go, now and from now on."""
        self._ended = True
        for wait in self._waits:
            wait.cancel()


def spread(poll_s: float) -> float:
    """For how long to hold a poll: those that begin together, after a restart, end in turns."""
    return poll_s * random.uniform(0.8, 1.0)


async def _next(parts: AsyncGenerator[_T]) -> _T | None:
    return await anext(parts, None)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
