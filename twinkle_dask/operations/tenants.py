"""API keys, and whose they are.

Keys are stored hashed. They are long random words, so a plain SHA-256 is enough (there is nothing
to guess), and looking one up by its hash takes the same time whoever asks.

Valid keys are in memory. They may be made and revoked beside a running server, so what is known is
read anew when it is older than a moment, and when an unknown key arrives.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import (
    InvalidRequest,
    NotAuthenticated,
    NotPermitted,
    StartupError,
    StorageFailed,
)
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import KeyOrigin, TenantKey
from twinkle_dask.store.store import Store
from twinkle_dask.types import TenantId

log = structlog.stdlib.get_logger(__name__)

_LOCAL = TenantId("local")
_HINTED_LENGTH = 20
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MAX_TEXT = 200
#: What is known of keys is at most so old.
_FRESH_S = 2.0
#: Unknown keys do not make us read more often than this.
_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """What may be told of a key: everything but the key."""

    key_id: int
    tenant: TenantId
    name: str
    hint: str
    note: str
    email: str | None
    created_at: datetime
    origin: KeyOrigin
    revoked_at: datetime | None = None


class Tenants:
    """Who may ask.

    Valid are the configured keys and those made with ``twinkle-dask keys``; without configured
    ones also those that earlier starts made for this data folder.
    """

    def __init__(self, store: Store, audit: Audit) -> None:
        self._store = store
        self._audit = audit
        self._configured: dict[str, TenantKey] = {}
        self._records: dict[int, TenantKey] = {}
        self._by_hash: dict[str, Tenant] = {}
        self._by_id: dict[int, Tenant] = {}
        self._read_s = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def configure(self, keys: tuple[str, ...], *, loopback: bool = True) -> str | None:
        """Make the configured keys valid; make one if there would be none at all.

        Args:
            keys: From the configuration.
            loopback: Whether only this machine can connect.

        Returns:
            The key that was made, to be shown once; None if there are others.

        Raises:
            StartupError: Others could connect, and no key was ever given out on purpose.
        """
        for key in keys:
            tenant = TenantId(f"tenant-{_digest(key)[:16]}")
            # A key that was made here and is configured now keeps its tenant.
            record = await self._store.keys.add(_record(key, tenant, KeyOrigin.CONFIGURED))
            self._configured[record.key_hash] = record
        known = await self._store.keys.all()
        made = None
        if not keys and not any(_is_live(key, KeyOrigin.COMMAND) for key in known):
            if not loopback:
                raise StartupError(
                    "Refusing to listen without an API key, since others could connect: give "
                    "--api-key tml-..., make one with 'twinkle-dask keys create', or listen on "
                    "127.0.0.1."
                )
            made = make_key()
            added = await self._store.keys.add(_record(made, _LOCAL, KeyOrigin.START))
            known = (*known, added)
        self._admit(known)
        return made

    async def authenticate(self, key: str | None) -> Tenant:
        """The tenant of a key.

        Raises:
            NotAuthenticated: No key, or one that is not valid here.
        """
        if not key:
            raise NotAuthenticated(
                "An API key is needed: in the header x-api-key, or as 'Authorization: Bearer KEY'."
            )
        await self._refresh()
        digest = _digest(key)
        if digest not in self._by_hash:
            await self._read_again()  # it may have been made a moment ago
        tenant = self._by_hash.get(digest)
        if tenant is None:
            raise NotAuthenticated("This API key is not known here.")
        return tenant

    async def of_key(self, key_id: int) -> Tenant | None:
        """The tenant of a key that proved itself before; None if the key is valid no more."""
        await self._refresh()
        return self._by_id.get(key_id)

    async def key(self, tenant: Tenant) -> KeyInfo:
        """What is known of the key with which a tenant asks."""
        return describe_key(self._records[tenant.key_id])

    async def key_names(self, key_ids: Iterable[int]) -> dict[int, str]:
        """What keys are called, also those that are valid no more."""
        wanted = set(key_ids)
        keys = await self._store.keys.all() if wanted else ()
        return {key.key_id: key.name for key in keys if key.key_id in wanted}

    async def revoke(self, tenant: Tenant) -> None:
        """End the key with which a tenant asks, and everything that was given for it.

        Raises:
            NotPermitted: It stands in the configuration.
        """
        record = self._records[tenant.key_id]
        if record.key_hash in self._configured:
            raise NotPermitted(
                "This key stands in the server's configuration, so only the operator can end it: "
                "by taking it out there and starting the server again."
            )
        await self._store.keys.revoke(record.key_hash, utc_now())
        self._forget(record)
        await self._audit.record(tenant, "keys.revoked", key=record.name, key_id=str(record.key_id))

    async def _refresh(self) -> None:
        if time.monotonic() - self._read_s > _FRESH_S:
            await self._read_again()

    async def _read_again(self) -> None:
        """Wait for a reading that begins after this call; callers share one."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="read keys")
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        await asyncio.sleep(max(0.0, self._read_s + _PAUSE_S - time.monotonic()))
        self._reading = None  # whoever comes from now on needs another one
        self._read_s = time.monotonic()
        try:
            self._admit(await self._store.keys.all())
        except StorageFailed as error:
            log.warning("keys_not_read", error=error.message)  # what was known goes on

    def _admit(self, known: Iterable[TenantKey]) -> None:
        valid = {key.key_hash: key for key in known if self._is_valid(key)}
        valid |= self._configured
        self._records = {key.key_id: key for key in valid.values()}
        self._by_hash = {key_hash: _tenant(key) for key_hash, key in valid.items()}
        self._by_id = {tenant.key_id: tenant for tenant in self._by_hash.values()}
        self._read_s = time.monotonic()

    def _is_valid(self, key: TenantKey) -> bool:
        if _is_live(key, KeyOrigin.COMMAND):
            return True
        return not self._configured and _is_live(key, KeyOrigin.START)

    def _forget(self, record: TenantKey) -> None:
        self._by_hash.pop(record.key_hash, None)
        self._by_id.pop(record.key_id, None)
        self._records.pop(record.key_id, None)


async def create_key(
    store: Store, *, tenant: str, name: str, note: str | None, email: str | None
) -> str:
    """Make a key for a tenant, which begins to exist with it; a running server soon knows it.

    Returns:
        The key, which cannot be had again.

    Raises:
        InvalidRequest: The tenant's name is none, or a text is too long.
    """
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            "A tenant's name has up to 64 letters, digits and . _ @ -, and begins with a letter or "
            f"digit; {tenant[:80]!r} does not."
        )
    for what, text in (("name", name), ("note", note), ("email", email)):
        if len(text or "") > _MAX_TEXT:
            raise InvalidRequest(f"A key's {what} has at most {_MAX_TEXT} characters.")
    key = make_key()
    made = TenantKey(
        key_hash=_digest(key),
        tenant_id=TenantId(tenant),
        name=name,
        hint=key_hint(key),
        created_at=utc_now(),
        origin=KeyOrigin.COMMAND,
        note=note,
        email=email,
    )
    await store.keys.add(made)
    await Audit(store).record(_operator(made), "keys.created", key=name, key_id=str(made.key_id))
    return key


async def revoke_key(store: Store, key_id: int) -> KeyInfo:
    """End a key by its id, as an operator; a running server soon knows.

    Raises:
        InvalidRequest: There is no such key, or it is configured, or was revoked before.
    """
    found = [key for key in await store.keys.all() if key.key_id == key_id]
    if not found:
        raise InvalidRequest(f"There is no key {key_id}; 'twinkle-dask keys list' shows them.")
    key = found[0]
    if key.origin in (None, KeyOrigin.CONFIGURED):
        raise InvalidRequest(
            f"Key {key_id} stands in the configuration; take it out there and start the server "
            "again."
        )
    if not await store.keys.revoke(key.key_hash, utc_now()):
        raise InvalidRequest(f"Key {key_id} was revoked before.")
    await Audit(store).record(_operator(key), "keys.revoked", key=key.name, key_id=str(key_id))
    return describe_key(key)


def describe_key(key: TenantKey) -> KeyInfo:
    """A key as its holder and the operator may see it."""
    return KeyInfo(
        key_id=key.key_id,
        tenant=key.tenant_id,
        name=key.name,
        hint=key.hint,
        note=key.note or "",
        email=key.email,
        created_at=key.created_at,
        origin=key.origin or KeyOrigin.CONFIGURED,
        revoked_at=key.revoked_at,
    )


def make_key() -> str:
    """A new key, in the form that the official client insists on."""
    return f"tml-{secrets.token_urlsafe(24)}"


def key_hint(key: str) -> str:
    """The end of a key, to tell keys apart by; nothing of one so short that it would help."""
    return key[-4:] if len(key) >= _HINTED_LENGTH else ""


def _is_live(key: TenantKey, origin: KeyOrigin) -> bool:
    return key.origin is origin and key.revoked_at is None


def _tenant(key: TenantKey) -> Tenant:
    return Tenant(
        id=key.tenant_id,
        name=key.tenant_id,
        key_hint=key.hint,
        key_id=key.key_id,
        key_name=key.name,
        email=key.email,
    )


def _operator(key: TenantKey) -> Tenant:
    """Who stands in a tenant's audit trail for what was done to its keys on the server itself."""
    return Tenant(id=key.tenant_id, name="operator", key_hint=key.hint)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _record(key: str, tenant: TenantId, origin: KeyOrigin) -> TenantKey:
    return TenantKey(
        key_hash=_digest(key),
        tenant_id=tenant,
        name=tenant,
        hint=key_hint(key),
        created_at=utc_now(),
        origin=origin,
    )
