"""What an ended session leaves behind, and freeing it."""

import structlog

from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.events import Events
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.processors import Processors
from twinkle_dask.operations.recording import Recording
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.sweeping import remove_all
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import RunPhase, RunRecord
from twinkle_dask.store.store import Store

log = structlog.stdlib.get_logger(__name__)


#: A client polls again at once as long as it waits for something.
_FORGET_EVENTS_S = 600.0


class Closing:
    """Closes the runs of ended sessions, and those that were unloaded.

    What was acknowledged before the end is still done, and results and named checkpoints stay.
    Everything else goes: the lane, the snapshot, the payloads in the journal, and weights that
    were saved for one sampler only. It goes by what the records say and not by events, so what
    was missed, by a failure or a restart, is made up for in the next round.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        sessions: Sessions,
        runs: Runs,
        samplers: Samplers,
        events: Events,
        recording: Recording,
        inflight: InflightWeights,
        checkpoints: Checkpoints,
        processors: Processors,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._sessions = sessions
        self._runs = runs
        self._samplers = samplers
        self._events = events
        self._recording = recording
        self._inflight = inflight
        self._checkpoints = checkpoints
        self._processors = processors

    async def close_ended(self) -> None:
        """One round. A run that still has work, or weights being sampled, wait for a later one.

        Raises:
            StorageFailed: The records cannot be read or written; the next round goes on.
        """
        await self._runs.drop_ended()
        self._samplers.forget_ended()
        self._events.forget_idle(_FORGET_EVENTS_S)
        for run in await self._store.runs.to_close():
            # The record of a session ends a moment before the session does; see Sessions.
            active = self._sessions.is_active(run.session_id)
            over = run.state is RunPhase.UNLOADED or not active
            if over and not self._runs.has_lane(run.id):
                await self._close(run)
        for weights in await self._store.checkpoints.left_behind():
            await self._checkpoints.try_to_remove(weights)
        await self._inflight.remove_superseded()
        await self._recording.remove_ended()
        await self._store.custom_losses.remove_ended()
        await self._processors.close_ended()

    async def _close(self, run: RunRecord) -> None:
        await self._store.runs.close(run.id)
        payloads = await self._store.journal.prune_replayed(run.id)
        pending = await self._store.run_settings.remove(run.id)
        left = [pending] if pending else []
        await remove_all(self._blobs, [*payloads, *left, f"snapshots/{run.id}"])
        log.info("run_closed", run=run.id)
