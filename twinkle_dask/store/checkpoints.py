"""Checkpoint records; their files are blobs.

A checkpoint whose time has come is out of every answer here, whether its record is still there or
not. To delete one is to let its time come: what is then left to do can be done again.
"""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    Update,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database, Page, insert_new
from twinkle_dask.store.records import (
    CheckpointKind,
    CheckpointRecord,
    OperationState,
    RunPhase,
    SessionState,
)
from twinkle_dask.store.rows import from_row, to_row
from twinkle_dask.store.tables import checkpoints as t
from twinkle_dask.store.tables import inflight_weights, operations, runs, samplers, sessions
from twinkle_dask.types import RunId, TenantId


class Checkpoints:
    """The checkpoints of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, checkpoint: CheckpointRecord, *, overwrite: bool = False
    ) -> CheckpointRecord | None:
        """Store a checkpoint.

        Returns:
            None if it is stored and nobody held its name, else the record that did. With
            ``overwrite``, and where that one's time has come, the new one has taken its place and
            the older one has lost its name: it is to be removed. Without, nothing was stored.
        """
        same = t.c.id == checkpoint.id
        if checkpoint.name is not None:
            of_run = and_(t.c.run_id == checkpoint.run_id, t.c.kind == checkpoint.kind)
            same = or_(same, and_(of_run, t.c.name == checkpoint.name))
        row = to_row(checkpoint)

        def work(connection: Connection) -> CheckpointRecord | None:
            if insert_new(connection, t, row):
                return None
            # Its own row comes first: done again, it may have lost its name to a later one.
            found = connection.execute(select(t).where(same).order_by(t.c.id != checkpoint.id))
            holder = from_row(CheckpointRecord, found.mappings().fetchmany(1)[0])
            gone = holder.expires_at is not None and holder.expires_at <= checkpoint.created_at
            if holder.id != checkpoint.id and (overwrite or gone):
                connection.execute(_retire(holder.id, checkpoint.created_at))
                insert_new(connection, t, row)
            return holder

        return await self._database.write(work)

    async def get(
        self, tenant: TenantId, run: RunId, kind: CheckpointKind, name: str
    ) -> CheckpointRecord | None:
        """The tenant's own checkpoint; None if there is none or it is another tenant's."""
        return await self._named(t.c.tenant_id == tenant, run, kind, name)

    async def readable(
        self, tenant: TenantId, run: RunId, kind: CheckpointKind, name: str
    ) -> CheckpointRecord | None:
        """A checkpoint that is the tenant's or public."""
        return await self._named(_readable(tenant), run, kind, name)

    async def _named(
        self, which: ColumnElement[bool], run: RunId, kind: CheckpointKind, name: str
    ) -> CheckpointRecord | None:
        this = and_(t.c.run_id == run, t.c.kind == kind, t.c.name == name)
        return await self._database.one(CheckpointRecord, select(t).where(which, this, _live()))

    async def at_path(self, tenant: TenantId, path: str) -> CheckpointRecord | None:
        """The tenant's named checkpoint with its files in a folder; of copies the first."""
        mine = and_(t.c.tenant_id == tenant, t.c.path == path, t.c.name.is_not(None), _live())
        query = select(t).where(mine).order_by(t.c.created_at, t.c.id).limit(1)
        return await self._database.one(CheckpointRecord, query)

    async def by_id(self, checkpoint: str) -> CheckpointRecord | None:
        """The checkpoint with this id, whosever it is: for those who were let in before."""
        return await self._database.one(
            CheckpointRecord, select(t).where(t.c.id == checkpoint, _live())
        )

    async def latest(
        self, tenant: TenantId, runs: Iterable[RunId]
    ) -> dict[tuple[RunId, CheckpointKind], CheckpointRecord]:
        """The newest named checkpoint of each kind, for many runs in one query.

        Of another tenant's runs only public ones count.
        """
        newest_first = (t.c.created_at.desc(), t.c.id)
        place = func.row_number().over(partition_by=(t.c.run_id, t.c.kind), order_by=newest_first)
        named = and_(_readable(tenant), t.c.run_id.in_(tuple(runs)), t.c.name.is_not(None), _live())
        ranked = select(t.c.id, place.label("place")).where(named).subquery()
        query = select(t).join(ranked, and_(ranked.c.id == t.c.id, ranked.c.place == 1))
        return {
            (found.run_id, found.kind): found
            for found in await self._database.all(CheckpointRecord, query)
        }

    async def for_run(self, tenant: TenantId, run: RunId) -> tuple[CheckpointRecord, ...]:
        """The run's named checkpoints, oldest first; of another tenant's run the public ones."""
        named = and_(_readable(tenant), t.c.run_id == run, t.c.name.is_not(None), _live())
        return await self._database.all(
            CheckpointRecord, select(t).where(named).order_by(t.c.created_at, t.c.id)
        )

    async def page(
        self, tenant: TenantId, limit: int, offset: int, *, exports: bool = True
    ) -> Page[CheckpointRecord]:
        """The tenant's own named checkpoints, newest first, and their total number."""
        named = and_(t.c.tenant_id == tenant, t.c.name.is_not(None), _live())
        if not exports:
            named = and_(named, t.c.kind != CheckpointKind.EXTERNAL)
        return await self._database.page(CheckpointRecord, t, named, limit, offset)

    async def set_expiry(self, checkpoint: str, when: datetime | None) -> bool:
        """Let the checkpoint expire at ``when``, or never; False if there is none any more."""
        statement = update(t).where(t.c.id == checkpoint, _live()).values(expires_at=when)
        return await self._database.change(statement) == 1

    async def set_public(self, checkpoint: str, public: bool) -> bool:
        """Let others read the checkpoint, or no longer; False if it was so already, or is gone."""
        differs = and_(t.c.id == checkpoint, t.c.public.is_not(public), _live())
        return await self._database.change(update(t).where(differs).values(public=public)) == 1

    async def touch(self, checkpoints: Iterable[str], when: datetime) -> None:
        """Note in one write that weights were sampled."""
        await self._database.change_named(update(t).values(last_used_at=when), t.c.id, checkpoints)

    async def expired(self, now: datetime) -> tuple[CheckpointRecord, ...]:
        """Every checkpoint of every tenant whose time has come, unnamed ones included."""
        return await self._database.all(
            CheckpointRecord, select(t).where(t.c.expires_at <= now).order_by(t.c.expires_at)
        )

    async def left_behind(self) -> tuple[CheckpointRecord, ...]:
        """Every unnamed one of an ended session that no sample is waiting for.

        Only its sampler could reach it, and that belongs to the session of the run, which is over.
        """
        over = and_(runs.c.state == RunPhase.CLOSED, sessions.c.state != SessionState.ACTIVE)
        query = (
            select(t)
            .join(runs, runs.c.id == t.c.run_id)
            .join(sessions, sessions.c.id == runs.c.session_id)
            .where(t.c.name.is_(None), over, ~_being_drawn())
        )
        return await self._database.all(CheckpointRecord, query)

    async def idle(self, before: datetime) -> tuple[CheckpointRecord, ...]:
        """Every unnamed one that nobody sampled since ``before``, but for each run's newest.

        Inflight weights stay, too: they go when newer ones replace them.
        """
        newer = t.alias()
        followed = exists().where(
            newer.c.run_id == t.c.run_id,
            newer.c.kind == t.c.kind,
            newer.c.name.is_(None),
            newer.c.created_at > t.c.created_at,
        )
        inflight = exists().where(inflight_weights.c.checkpoint_id == t.c.id)
        query = (
            select(t)
            .join(runs, runs.c.id == t.c.run_id)
            .where(
                t.c.name.is_(None),
                ~inflight,
                func.coalesce(t.c.last_used_at, t.c.created_at) < before,
                followed.correlate(t),
                ~_being_drawn(),
            )
        )
        return await self._database.all(CheckpointRecord, query)

    async def retire(self, checkpoint: str, now: datetime) -> None:
        """Take its name and let its time come, so that its files can go."""
        await self._database.write(lambda connection: connection.execute(_retire(checkpoint, now)))

    async def is_shared(self, checkpoint: CheckpointRecord) -> bool:
        """Whether another checkpoint that is still alive has the same files."""
        other = and_(t.c.path == checkpoint.path, t.c.id != checkpoint.id, _live())
        return bool(await self._database.scalar(select(exists().where(other))))

    async def has_folder(self, path: str) -> bool:
        """Whether a checkpoint that is alive has its files there."""
        return bool(await self._database.scalar(select(exists().where(t.c.path == path, _live()))))

    async def delete(self, checkpoint: str) -> bool:
        """Remove the record (not its files); False if there is none."""
        return await self._database.change(delete(t).where(t.c.id == checkpoint)) == 1


def _live() -> ColumnElement[bool]:
    return or_(t.c.expires_at.is_(None), t.c.expires_at > utc_now())


def _readable(tenant: TenantId) -> ColumnElement[bool]:
    return or_(t.c.tenant_id == tenant, t.c.public.is_(True))


def _retire(checkpoint: str, now: datetime) -> Update:
    return update(t).where(t.c.id == checkpoint).values(name=None, expires_at=now, public=False)


def _being_drawn() -> ColumnElement[bool]:
    """Whether a sample waits for the weights; the query has the checkpoint's run."""
    return exists().where(
        samplers.c.session_id == runs.c.session_id,
        or_(samplers.c.checkpoint_id == t.c.id, samplers.c.follows_run_id == t.c.run_id),
        operations.c.sampler_id == samplers.c.id,
        operations.c.state == OperationState.PENDING,
    )
