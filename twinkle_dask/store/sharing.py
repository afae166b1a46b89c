"""What others than its owner may know of: runs with a published checkpoint."""

from collections.abc import Iterable

from sqlalchemy import ColumnElement, and_, exists, func, or_, select

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database, Page
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord, RunRecord
from twinkle_dask.store.tables import checkpoints, runs, sessions
from twinkle_dask.types import RunId, TenantId


class Sharing:
    """Runs as far as a tenant may see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, tenant: TenantId, run: RunId) -> RunRecord | None:
        """A run that is the tenant's or has a published checkpoint."""
        query = select(runs).where(runs.c.id == run, _accessible(tenant))
        return await self._database.one(RunRecord, query)

    async def runs(
        self, tenant: TenantId, limit: int, offset: int, *, project: str | None, accessible: bool
    ) -> Page[RunRecord]:
        """Runs, newest first, and their total number.

        Args:
            tenant: Who asks.
            limit: At most so many.
            offset: So many newer ones are left out.
            project: Only those whose session has this label. Labels are their owner's, so that
                leaves the tenant's own.
            accessible: Also others' with a published checkpoint.
        """
        which = _accessible(tenant) if accessible else runs.c.tenant_id == tenant
        if project is not None:
            labelled = exists().where(
                sessions.c.id == runs.c.session_id, sessions.c.project_id == project
            )
            which = and_(runs.c.tenant_id == tenant, labelled)
        return await self._database.page(RunRecord, runs, which, limit, offset)

    async def latest_published(
        self, among: Iterable[RunId]
    ) -> dict[tuple[RunId, CheckpointKind], CheckpointRecord]:
        """The newest published checkpoint of each kind, for many runs in one query."""
        t = checkpoints
        newest_first = (t.c.created_at.desc(), t.c.id)
        place = func.row_number().over(partition_by=(t.c.run_id, t.c.kind), order_by=newest_first)
        chosen = and_(t.c.run_id.in_(tuple(among)), _published())
        ranked = select(t.c.id, place.label("place")).where(chosen).subquery()
        query = select(t).join(ranked, and_(ranked.c.id == t.c.id, ranked.c.place == 1))
        return {
            (found.run_id, found.kind): found
            for found in await self._database.all(CheckpointRecord, query)
        }


def _accessible(tenant: TenantId) -> ColumnElement[bool]:
    published = exists().where(checkpoints.c.run_id == runs.c.id, _published())
    return or_(runs.c.tenant_id == tenant, published)


def _published() -> ColumnElement[bool]:
    expires = checkpoints.c.expires_at
    alive = or_(expires.is_(None), expires > utc_now())
    return and_(checkpoints.c.public.is_(True), checkpoints.c.name.is_not(None), alive)
