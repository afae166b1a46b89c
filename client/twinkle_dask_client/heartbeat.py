"""Keeping a session alive: a thread for the plain client, a task for the async one.

Both beat at a fixed rate and go on through failures that pass. What the service says about the
session itself (it is not there any more) ends them; the next call of the client then says so.
"""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable

from twinkle_dask_client.errors import ClientError, Gone, NotFound, SessionLost


def lost(error: ClientError) -> SessionLost | None:
    """What a failed beat means for the session; None if it may pass."""
    if isinstance(error, NotFound | Gone):
        return SessionLost(
            f"The service has ended this session ({error.message}). Make a new client; load what "
            "was saved.",
            error.status,
        )
    return None


class Heartbeat:
    """A thread that beats until it is stopped.

    Args:
        beat: Sends one; raises ``ClientError``.
        interval_s: Between two of them.
    """

    def __init__(self, beat: Callable[[], object], interval_s: float) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self._stop = threading.Event()
        self.lost: SessionLost | None = None
        self._thread = threading.Thread(target=self._run, name="twinkle-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; a beat that is on its way is not waited for."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._beat()
            except ClientError as error:
                self.lost = lost(error)
                if self.lost is not None:
                    return
            except RuntimeError:  # the client was closed meanwhile
                return


class AsyncHeartbeat:
    """A task that beats until it is stopped; the arguments are those of ``Heartbeat``."""

    def __init__(self, beat: Callable[[], Awaitable[object]], interval_s: float) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self.lost: SessionLost | None = None
        self._task = asyncio.create_task(self._run(), name="twinkle-heartbeat")

    async def stop(self) -> None:
        """End it."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._beat()
            except ClientError as error:
                self.lost = lost(error)
                if self.lost is not None:
                    return
