"""Checkpoint records; their files are blobs."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection, and_, delete, exists, func, or_, select, update

from twinkle_dask.store.database import Database, Page, insert_new
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord, OperationState, RunPhase
from twinkle_dask.store.rows import from_row, to_row
from twinkle_dask.store.tables import checkpoints as t
from twinkle_dask.store.tables import operations, runs, samplers
from twinkle_dask.types import RunId, TenantId


class Checkpoints:
    """The checkpoints of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, checkpoint: CheckpointRecord, *, overwrite: bool = False
    ) -> CheckpointRecord | None:
        """Store a checkpoint whose files are in place, unless its name is taken.

        With ``overwrite`` the holder of the same run, kind and name (or id) gives way in the same
        transaction: give every version a folder of its own, and readers never see half a change.

        Returns:
            None if the name was free, else its holder: the one that gave way, or, without
            ``overwrite``, the one that stands while ``checkpoint`` is not stored. The folder of
            the loser can be removed.
        """
        same = t.c.id == checkpoint.id
        if checkpoint.name is not None:
            of_run = and_(t.c.run_id == checkpoint.run_id, t.c.kind == checkpoint.kind)
            same = or_(same, and_(of_run, t.c.name == checkpoint.name))
        row = to_row(checkpoint)

        def work(connection: Connection) -> CheckpointRecord | None:
            if insert_new(connection, t, row):
                return None
            found = connection.execute(select(t).where(same))
            holder = from_row(CheckpointRecord, found.mappings().one())
            if overwrite:
                connection.execute(delete(t).where(t.c.id == holder.id))
                insert_new(connection, t, row)
            return holder

        return await self._database.write(work)

    async def get(
        self, tenant: TenantId, run: RunId, kind: CheckpointKind, name: str
    ) -> CheckpointRecord | None:
        """The tenant's checkpoint; None if there is none or it is another tenant's."""
        mine = and_(t.c.tenant_id == tenant, t.c.run_id == run)
        query = select(t).where(mine, t.c.kind == kind, t.c.name == name)
        return await self._database.one(CheckpointRecord, query)

    async def by_id(self, tenant: TenantId, checkpoint: str) -> CheckpointRecord | None:
        """The tenant's checkpoint with this id."""
        return await self._database.one(
            CheckpointRecord, select(t).where(t.c.id == checkpoint, t.c.tenant_id == tenant)
        )

    async def latest(
        self, tenant: TenantId, runs: Iterable[RunId]
    ) -> dict[tuple[RunId, CheckpointKind], CheckpointRecord]:
        """The newest named checkpoint of each kind, for many runs in one query."""
        newest_first = (t.c.created_at.desc(), t.c.id)
        place = func.row_number().over(partition_by=(t.c.run_id, t.c.kind), order_by=newest_first)
        named = and_(t.c.tenant_id == tenant, t.c.run_id.in_(tuple(runs)), t.c.name.is_not(None))
        ranked = select(t.c.id, place.label("place")).where(named).subquery()
        query = select(t).join(ranked, and_(ranked.c.id == t.c.id, ranked.c.place == 1))
        return {
            (found.run_id, found.kind): found
            for found in await self._database.all(CheckpointRecord, query)
        }

    async def for_run(self, tenant: TenantId, run: RunId) -> tuple[CheckpointRecord, ...]:
        """The run's named checkpoints, oldest first."""
        named = and_(t.c.tenant_id == tenant, t.c.run_id == run, t.c.name.is_not(None))
        return await self._database.all(
            CheckpointRecord, select(t).where(named).order_by(t.c.created_at, t.c.id)
        )

    async def page(self, tenant: TenantId, limit: int, offset: int) -> Page[CheckpointRecord]:
        """The tenant's named checkpoints, newest first, and their total number."""
        named = and_(t.c.tenant_id == tenant, t.c.name.is_not(None))
        return await self._database.page(CheckpointRecord, t, named, limit, offset)

    async def set_expiry(self, checkpoint: str, when: datetime | None) -> bool:
        """Let the checkpoint expire at ``when``, or never; False if there is none."""
        statement = update(t).where(t.c.id == checkpoint).values(expires_at=when)
        return await self._database.change(statement) == 1

    async def expired(self, now: datetime) -> tuple[CheckpointRecord, ...]:
        """Every checkpoint of every tenant whose time has come, unnamed ones included."""
        return await self._database.all(
            CheckpointRecord, select(t).where(t.c.expires_at <= now).order_by(t.c.expires_at)
        )

    async def left_behind(self) -> tuple[CheckpointRecord, ...]:
        """Every unnamed one of a closed run that no sample is waiting for.

        Only its sampler could reach it, and that belongs to the session of the run, which is over.
        """
        drawing = exists().where(
            samplers.c.session_id == runs.c.session_id,
            samplers.c.checkpoint_id == t.c.id,
            operations.c.sampler_id == samplers.c.id,
            operations.c.state == OperationState.PENDING,
        )
        query = (
            select(t)
            .join(runs, runs.c.id == t.c.run_id)
            .where(t.c.name.is_(None), runs.c.state == RunPhase.CLOSED, ~drawing)
        )
        return await self._database.all(CheckpointRecord, query)

    async def delete(self, checkpoint: str) -> bool:
        """Remove the record (not its files); False if there is none."""
        return await self._database.change(delete(t).where(t.c.id == checkpoint)) == 1
