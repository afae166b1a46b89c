"""API keys. Each configured key is a tenant; a key made here belongs to the tenant ``local``.

Keys are stored hashed. They are long random words, so a plain SHA-256 is enough (there is nothing
to guess), and looking one up by its hash takes the same time whoever asks.
"""

import hashlib
import secrets

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import NotAuthenticated
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import TenantKey
from twinkle_dask.store.store import Store
from twinkle_dask.types import TenantId

_LOCAL = TenantId("local")
_HINTED_LENGTH = 20


class Tenants:
    """Who may ask.

    With configured keys only those are valid. Without, the keys made for this data folder are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_hash: dict[str, Tenant] = {}

    async def configure(self, keys: tuple[str, ...]) -> str | None:
        """Make the configured keys valid, or make one.

        Returns:
            The key that was made, to be shown once; None if keys were given.
        """
        if not keys:
            for record in await self._store.keys.all():
                if record.tenant_id == _LOCAL:
                    self._admit(record)
            made = f"tml-{secrets.token_urlsafe(24)}"
            self._admit(await self._store.keys.add(_record(made, _LOCAL)))
            return made
        for key in keys:
            tenant = TenantId(f"tenant-{_digest(key)[:16]}")
            # A key that was made here and is configured now keeps its tenant.
            self._admit(await self._store.keys.add(_record(key, tenant)))
        return None

    def authenticate(self, key: str | None) -> Tenant:
        """The tenant of a key.

        Raises:
            NotAuthenticated: No key, or one that is not valid here.
        """
        if not key:
            raise NotAuthenticated("An API key is needed in the header x-api-key.")
        tenant = self._by_hash.get(_digest(key))
        if tenant is None:
            raise NotAuthenticated("This API key is not known here.")
        return tenant

    def _admit(self, record: TenantKey) -> None:
        tenant = Tenant(id=record.tenant_id, name=record.name, key_hint=record.hint)
        self._by_hash[record.key_hash] = tenant


def key_hint(key: str) -> str:
    """The end of a key, to tell keys apart by; nothing of one so short that it would help."""
    return key[-4:] if len(key) >= _HINTED_LENGTH else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _record(key: str, tenant: TenantId) -> TenantKey:
    return TenantKey(
        key_hash=_digest(key),
        tenant_id=tenant,
        name=tenant,
        hint=key_hint(key),
        created_at=utc_now(),
    )
