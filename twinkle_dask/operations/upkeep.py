"""What happens by itself: heartbeats written down, sessions expired, old things removed."""

import asyncio
from datetime import timedelta

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.config import ServiceConfig
from twinkle_dask.errors import StorageFailed
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.closing import Closing
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.sweeping import remove_all
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store

log = structlog.stdlib.get_logger(__name__)

#: A round removes at most so many operations, some at a time so that others get their turn.
_PRUNE_AT_ONCE = 1_000
_MAX_PRUNES = 50


class Upkeep:
    """A task that tidies every ``journal.prune_interval_s`` seconds."""

    def __init__(
        self,
        *,
        config: ServiceConfig,
        store: Store,
        blobs: BlobStore,
        sessions: Sessions,
        runs: Runs,
        samplers: Samplers,
        checkpoints: Checkpoints,
        tickets: TicketBoard,
        closing: Closing,
    ) -> None:
        self._config = config
        self._store = store
        self._blobs = blobs
        self._sessions = sessions
        self._runs = runs
        self._samplers = samplers
        self._checkpoints = checkpoints
        self._tickets = tickets
        self._closing = closing

    async def run_forever(self) -> None:
        """Tidy until cancelled."""
        while True:
            await asyncio.sleep(self._config.journal.prune_interval_s)
            await self.tidy()

    async def watch_queues(self) -> None:
        """Fail operations that wait too long, until cancelled."""
        timeout_s = self._config.limits.queue_timeout_s
        if timeout_s is None:
            return
        while True:
            await asyncio.sleep(min(1.0, timeout_s / 4))
            try:
                await self._runs.fail_waiting()
            except StorageFailed as error:
                log.warning("upkeep_failed", error=error.message)
            except Exception:
                log.exception("upkeep_failed")

    async def tidy(self) -> None:
        """One round. A step that fails is logged and tried again in the next one."""
        for step in (
            self.flush,
            self._expire,
            self._closing.close_ended,
            self._checkpoints.remove_expired,
            self._remove_idle,
            self._prune,
        ):
            try:
                await step()
            except StorageFailed as error:
                log.warning("upkeep_failed", error=error.message)
            except Exception:
                log.exception("upkeep_failed")

    async def flush(self) -> None:
        """Write down what is only in memory: who was heard of, what was sampled and delivered."""
        await self._sessions.flush()
        await self._runs.flush()
        await self._checkpoints.touch(self._samplers.take_used())
        delivered = self._tickets.take_delivered()
        if delivered:
            await self._store.journal.delivered(delivered, utc_now())

    async def _expire(self) -> None:
        await self._sessions.expire(self._config.limits.session_timeout_s)
        await self._runs.expire()

    async def _remove_idle(self) -> None:
        await self._checkpoints.remove_idle(self._config.journal.keep_idle_weights_s)

    async def _prune(self) -> None:
        now = utc_now()
        journal = self._config.journal
        await self._store.uploads.prune(now - timedelta(seconds=journal.keep_finished_s))
        for _ in range(_MAX_PRUNES):
            removed = await self._store.journal.prune(
                delivered_before=now - timedelta(seconds=journal.keep_delivered_s),
                finished_before=now - timedelta(seconds=journal.keep_finished_s),
                limit=_PRUNE_AT_ONCE,
            )
            paths = (path for one in removed for path in (one.payload_path, one.result_path))
            await remove_all(self._blobs, [path for path in paths if path is not None])
            if len(removed) < _PRUNE_AT_ONCE:
                return
