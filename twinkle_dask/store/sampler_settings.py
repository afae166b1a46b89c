"""What the samplers of a session are set to, for clients that do not say it with every sample."""

from sqlalchemy import ColumnElement, Connection, and_, select, update

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database, insert_new
from twinkle_dask.store.records import SamplerSettingsRecord
from twinkle_dask.store.rows import RowValues, to_row
from twinkle_dask.store.tables import sampler_settings as t
from twinkle_dask.types import Json, SessionId


class SamplerSettings:
    """A row per session, base model and adapter's name; the empty name stands for no adapter."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(
        self, session: SessionId, base_model: str, adapter: str
    ) -> SamplerSettingsRecord | None:
        """What was set; None if nothing was."""
        at = _at(session, base_model, adapter)
        return await self._database.one(SamplerSettingsRecord, select(t).where(at))

    async def set_template(
        self, session: SessionId, base_model: str, adapter: str, template: Json
    ) -> None:
        """Replace the template alone."""
        await self._set(session, base_model, adapter, {"template": template})

    async def set_weights(
        self, session: SessionId, base_model: str, adapter: str, weights: str | None
    ) -> None:
        """Replace what the adapter's name stands for alone."""
        await self._set(session, base_model, adapter, {"weights": weights})

    async def _set(
        self, session: SessionId, base_model: str, adapter: str, values: RowValues
    ) -> None:
        empty = SamplerSettingsRecord(
            session_id=session, base_model=base_model, adapter=adapter, created_at=utc_now()
        )

        def work(connection: Connection) -> None:
            insert_new(connection, t, to_row(empty))
            at = _at(session, base_model, adapter)
            connection.execute(update(t).where(at).values(values))

        await self._database.write(work)


def _at(session: SessionId, base_model: str, adapter: str) -> ColumnElement[bool]:
    return and_(t.c.session_id == session, t.c.base_model == base_model, t.c.adapter == adapter)
