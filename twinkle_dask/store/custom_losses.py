"""Losses that tenants define, for the time of their session."""

from sqlalchemy import ColumnElement, and_, delete, func, or_, select

from twinkle_dask.lifecycle import SessionState
from twinkle_dask.store.database import Database
from twinkle_dask.store.records import CustomLossRecord
from twinkle_dask.store.tables import custom_losses as t
from twinkle_dask.store.tables import sessions
from twinkle_dask.types import SessionId, TenantId

_ENDED = delete(t).where(
    t.c.session_id.in_(select(sessions.c.id).where(sessions.c.state != SessionState.ACTIVE))
)


class CustomLosses:
    """The losses of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, loss: CustomLossRecord) -> CustomLossRecord:
        """Store a loss and return what is stored: for a known (session, seq) the earlier one."""

        def same() -> ColumnElement[bool]:
            place = and_(t.c.session_id == loss.session_id, t.c.loss_seq == loss.loss_seq)
            return or_(t.c.id == loss.id, place)

        return await self._database.insert(t, loss, same)

    async def get(self, tenant: TenantId, loss: str) -> CustomLossRecord | None:
        """The tenant's loss; None if there is none or it is another tenant's."""
        return await self._database.one(
            CustomLossRecord, select(t).where(t.c.id == loss, t.c.tenant_id == tenant)
        )

    async def at(self, session: SessionId, seq: int) -> CustomLossRecord | None:
        """The loss with this number of a session."""
        return await self._database.one(
            CustomLossRecord, select(t).where(t.c.session_id == session, t.c.loss_seq == seq)
        )

    async def count(self, session: SessionId) -> int:
        """How many losses a session has."""
        query = select(func.count()).select_from(t).where(t.c.session_id == session)
        return await self._database.scalar(query)

    async def remove_ended(self) -> int:
        """Remove the losses of sessions that are over; how many those were."""
        return await self._database.change(_ENDED)
