"""Secrets that the service makes for itself and keeps across restarts."""

import secrets

from sqlalchemy import select

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database
from twinkle_dask.store.records import Secret
from twinkle_dask.store.tables import secrets as t

_NUM_BYTES = 32


class Secrets:
    """One secret for each purpose. Whoever can read the database can read them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, name: str) -> bytes:
        """The secret of this name, 32 random bytes; made at the first call."""
        found = await self._database.one(Secret, select(t).where(t.c.name == name))
        if found is None:
            made = Secret(name=name, value=secrets.token_bytes(_NUM_BYTES), created_at=utc_now())
            # Of several at a time the first one counts.
            found = await self._database.insert(t, made, lambda: t.c.name == name)
        return found.value
