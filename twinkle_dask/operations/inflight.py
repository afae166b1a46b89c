"""Weights that several samplers share, and that follow a run while it trains.

Every inflight save is a folder of its own, so that what is being drawn keeps its weights. The
samplers of a run take the newest one for each new sample; the others are removed once nothing is
drawn with them.
"""

from collections import Counter
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import NotFound
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.store.records import InflightRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint, its folder, and its place in the run's order."""

    checkpoint_id: str
    folder: str
    seq: int


class InflightWeights:
    """The newest inflight weights of every run, and who uses which."""

    def __init__(self, store: Store, checkpoints: Checkpoints) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._newest: dict[RunId, Weights] = {}
        self._users: Counter[str] = Counter()

    async def publish(self, run: RunId, seq: int, checkpoint: str, folder: str) -> None:
        """Let the run's samplers go on with a checkpoint that was saved at ``seq``.

        Repeating it changes nothing, nor does one that comes after a later one.
        """
        await self._store.inflight.add(
            InflightRecord(checkpoint_id=checkpoint, run_id=run, seq=seq, created_at=utc_now())
        )
        self._remember(run, Weights(checkpoint, folder, seq))

    async def newest(self, run: RunId) -> Weights:
        """What the run's samplers sample with now.

        Raises:
            NotFound: It was deleted.
        """
        while run not in self._newest:
            newest = await self._store.inflight.newest(run)
            if newest is None:
                raise _deleted(run)
            found = await self._store.checkpoints.by_id(newest.checkpoint_id)
            if found is not None:
                self._remember(run, Weights(found.id, found.path, newest.seq))
            elif await self._store.inflight.newest(run) == newest:
                raise _deleted(run)
        return self._newest[run]

    @contextmanager
    def using(self, checkpoint: str) -> Generator[None]:
        """Keep weights in place for the length of a block, newer ones or not."""
        self._users[checkpoint] += 1
        try:
            yield
        finally:
            self._users[checkpoint] -= 1
            if not self._users[checkpoint]:
                del self._users[checkpoint]

    async def remove_superseded(self) -> None:
        """Delete the weights that nobody samples with any more."""
        superseded = await self._store.inflight.superseded()
        for weights in superseded:
            if not self._users[weights.id]:
                await self._checkpoints.try_to_remove(weights)
        if superseded:
            await self._store.inflight.forget_removed()

    def keep(self, runs: Collection[RunId]) -> None:
        """Take all other runs out of memory; they are read again when they are asked for."""
        self._newest = {run: newest for run, newest in self._newest.items() if run in runs}

    def forget(self, checkpoint: str) -> None:
        """A checkpoint was removed; a run whose newest it was has none."""
        for run in [r for r, newest in self._newest.items() if newest.checkpoint_id == checkpoint]:
            del self._newest[run]

    def _remember(self, run: RunId, weights: Weights) -> None:
        known = self._newest.get(run)
        if known is None or known.seq <= weights.seq:
            self._newest[run] = weights


def _deleted(run: RunId) -> NotFound:
    return NotFound(f"The weights that run {run!r} saved for sampling were deleted; save again.")
