"""Weights that runs saved for all samplers that follow them; the newest counts."""

from sqlalchemy import delete, exists, select

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import CheckpointRecord, InflightRecord
from twinkle_dask.store.tables import checkpoints
from twinkle_dask.store.tables import inflight_weights as t
from twinkle_dask.types import RunId


class InflightWeights:
    """The inflight weights of all runs, newer ones beside those that they replaced."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, weights: InflightRecord) -> None:
        """Store where a checkpoint stands in its run's order. Repeating it changes nothing."""
        await self._database.insert(t, weights, lambda: t.c.checkpoint_id == weights.checkpoint_id)

    async def newest(self, run: RunId) -> InflightRecord | None:
        """The weights of the largest ``seq``; None if the run never saved any."""
        newest = select(t).where(t.c.run_id == run).order_by(t.c.seq.desc()).limit(1)
        return await self._database.one(InflightRecord, newest)

    async def superseded(self) -> tuple[CheckpointRecord, ...]:
        """Every checkpoint after which its run saved newer inflight weights."""
        later = t.alias()
        newer = exists().where(later.c.run_id == t.c.run_id, later.c.seq > t.c.seq)
        query = (
            select(checkpoints)
            .join(t, t.c.checkpoint_id == checkpoints.c.id)
            .where(newer)
            .order_by(t.c.seq)
        )
        return await self._database.all(CheckpointRecord, query)

    async def forget_removed(self) -> None:
        """Drop what is known of checkpoints that are not there any more."""
        there = exists().where(checkpoints.c.id == t.c.checkpoint_id)
        await self._database.change(delete(t).where(~there))
