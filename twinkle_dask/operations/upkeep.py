"""What happens by itself: heartbeats written down, sessions expired, old things removed."""

import asyncio
from datetime import timedelta

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.config import ServiceConfig
from twinkle_dask.errors import StorageFailed
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store

log = structlog.stdlib.get_logger(__name__)


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
        checkpoints: Checkpoints,
        tickets: TicketBoard,
    ) -> None:
        self._config = config
        self._store = store
        self._blobs = blobs
        self._sessions = sessions
        self._runs = runs
        self._checkpoints = checkpoints
        self._tickets = tickets

    async def run_forever(self) -> None:
        """Tidy until cancelled; a failure is logged and tried again next time."""
        while True:
            await asyncio.sleep(self._config.journal.prune_interval_s)
            try:
                await self.tidy()
            except StorageFailed as error:
                log.warning("upkeep_failed", error=error.message)
            except Exception:
                log.exception("upkeep_failed")

    async def tidy(self) -> None:
        """One round."""
        await self.flush()
        for session in await self._sessions.expire(self._config.limits.session_timeout_s):
            await self._runs.release_session(session)
        await self._checkpoints.remove_expired()
        await self._prune()

    async def flush(self) -> None:
        """Write down what is only in memory: who was heard of, and what was delivered."""
        await self._sessions.flush()
        await self._runs.flush()
        delivered = self._tickets.take_delivered()
        if delivered:
            await self._store.journal.delivered(delivered, utc_now())

    async def _prune(self) -> None:
        now = utc_now()
        journal = self._config.journal
        removed = await self._store.journal.prune(
            delivered_before=now - timedelta(seconds=journal.keep_delivered_s),
            finished_before=now - timedelta(seconds=journal.keep_finished_s),
        )
        for record in removed:
            for path in (record.payload_path, record.result_path):
                if path is not None:
                    await asyncio.to_thread(self._blobs.remove, path)
