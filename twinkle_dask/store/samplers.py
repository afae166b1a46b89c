"""Sampling sessions."""

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, update

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import SamplerRecord, SessionState
from twinkle_dask.store.tables import samplers as t
from twinkle_dask.store.tables import sessions
from twinkle_dask.types import SamplerId, SessionId, TenantId


class Samplers:
    """The samplers of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, sampler: SamplerRecord) -> SamplerRecord:
        """Store a sampler and return what is stored: for a known (session, seq) the earlier one."""

        def same() -> ColumnElement[bool]:
            in_session = t.c.session_id == sampler.session_id
            place = and_(in_session, t.c.sampler_seq == sampler.sampler_seq)
            return or_(t.c.id == sampler.id, place)

        return await self._database.insert(t, sampler, same)

    async def get(self, tenant: TenantId, sampler: SamplerId) -> SamplerRecord | None:
        """The tenant's sampler; None if there is none or it is another tenant's."""
        return await self._database.one(
            SamplerRecord, select(t).where(t.c.id == sampler, t.c.tenant_id == tenant)
        )

    async def in_session(self, session: SessionId) -> tuple[SamplerRecord, ...]:
        """The session's samplers by ``sampler_seq``."""
        query = select(t).where(t.c.session_id == session).order_by(t.c.sampler_seq)
        return await self._database.all(SamplerRecord, query)

    async def num_active(self, tenant: TenantId) -> int:
        """How many samplers of sessions that are alive the tenant has."""
        alive = and_(t.c.tenant_id == tenant, sessions.c.state == SessionState.ACTIVE)
        both = t.join(sessions, sessions.c.id == t.c.session_id)
        query = select(func.count()).select_from(both).where(alive)
        return await self._database.read(lambda connection: connection.execute(query).scalar_one())

    async def join(self, sampler: SamplerId) -> int:
        """Count another client of the sampler; gives its number, which no other will get."""
        this = t.c.id == sampler

        def work(connection: Connection) -> int:
            connection.execute(update(t).where(this).values(num_joined=t.c.num_joined + 1))
            return connection.execute(select(t.c.num_joined).where(this)).scalar_one()

        return await self._database.write(work)
