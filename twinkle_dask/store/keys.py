"""API keys, by their hash."""

from datetime import datetime

from sqlalchemy import select, update

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import TenantKey
from twinkle_dask.store.tables import tenant_keys as t


class Keys:
    """Which hashes belong to which tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, key: TenantKey) -> TenantKey:
        """Store a key and return what is stored: for a known hash the earlier record."""
        return await self._database.insert(t, key, lambda: t.c.key_hash == key.key_hash)

    async def all(self) -> tuple[TenantKey, ...]:
        """Every key, oldest first."""
        return await self._database.all(TenantKey, select(t).order_by(t.c.created_at, t.c.key_hash))

    async def revoke(self, key_hash: str, when: datetime) -> bool:
        """Take a key's validity; False if it has none (or there is no such key)."""
        valid = update(t).where(t.c.key_hash == key_hash, t.c.revoked_at.is_(None))
        return await self._database.change(valid.values(revoked_at=when)) == 1
