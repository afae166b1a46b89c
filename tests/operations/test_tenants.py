"""Which keys are valid."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotAuthenticated, NotPermitted, StartupError
from twinkle_dask.operations import tenants as module
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.tenants import Tenants, create_key, revoke_key
from twinkle_dask.store.store import Store, sqlite_url

GIVEN = "tml-given-in-the-configuration"


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncGenerator[Store]:
    opened = await Store.open(sqlite_url(tmp_path / "records.sqlite3"))
    yield opened
    await opened.close()


async def started(store: Store, *keys: str, loopback: bool = True) -> tuple[Tenants, str | None]:
    tenants = Tenants(store, Audit(store))
    return tenants, await tenants.configure(keys, loopback=loopback)


async def made(store: Store, name: str = "ann") -> str:
    return await create_key(store, tenant=name, name=name, note=None, email=None)


async def is_valid(tenants: Tenants, key: str) -> bool:
    try:
        tenant = await tenants.authenticate(key)
    except NotAuthenticated:
        return False
    assert await tenants.of_key(tenant.key_id) == tenant
    return True


async def test_a_key_is_made_where_there_is_none(store: Store) -> None:
    first, key = await started(store)
    assert key is not None
    assert (await first.authenticate(key)).id == "local"
    second, other = await started(store)
    assert other is not None
    assert await is_valid(second, key)
    assert await is_valid(second, other)
    # As soon as keys are configured, only those are valid.
    third, none = await started(store, GIVEN)
    assert none is None
    assert await is_valid(third, GIVEN)
    assert not await is_valid(third, key)


async def test_a_configured_key_that_is_taken_out_is_not_valid(store: Store) -> None:
    await started(store, GIVEN)
    later, _ = await started(store, "tml-another-one")
    assert not await is_valid(later, GIVEN)


async def test_no_key_is_made_beside_those_of_the_operator(store: Store) -> None:
    key = await made(store)
    for configured in ((), (GIVEN,)):
        tenants, none = await started(store, *configured, loopback=False)
        assert none is None
        assert (await tenants.authenticate(key)).id == "ann"


async def test_an_open_address_needs_a_key(store: Store) -> None:
    await started(store)  # one that was made at a start is none on purpose
    with pytest.raises(StartupError, match="--api-key"):
        await started(store, loopback=False)


async def test_a_key_made_meanwhile_is_known_and_a_revoked_one_forgotten(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants, _ = await started(store, GIVEN)
    key = await made(store)
    tenant = await tenants.authenticate(key)
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    revoked = await revoke_key(store, tenant.key_id)
    assert (revoked.tenant, revoked.name) == ("ann", "ann")
    assert not await is_valid(tenants, key)
    assert await tenants.of_key(tenant.key_id) is None
    assert await tenants.key_names([tenant.key_id, 5]) == {tenant.key_id: "ann"}
    with pytest.raises(InvalidRequest, match="before"):
        await revoke_key(store, tenant.key_id)


async def test_a_tenant_ends_its_own_key(store: Store) -> None:
    tenants, _ = await started(store, GIVEN)
    key = await made(store)
    tenant = await tenants.authenticate(key)
    await tenants.revoke(tenant)
    assert not await is_valid(tenants, key)
    events = await Audit(store).of_day(tenant, None, family="keys")
    assert {event.event for event in events} == {"keys.created", "keys.revoked"}
    configured = await tenants.authenticate(GIVEN)
    with pytest.raises(NotPermitted):
        await tenants.revoke(configured)
    with pytest.raises(InvalidRequest, match="configuration"):
        await revoke_key(store, configured.key_id)


async def test_configured_wins_over_revoked(store: Store) -> None:
    tenants, _ = await started(store, GIVEN)
    record = (await store.keys.all())[0]
    assert await store.keys.revoke(record.key_hash, utc_now())
    again, _ = await started(store, GIVEN)
    for one in (tenants, again):
        assert await is_valid(one, GIVEN)
    assert replace(record, revoked_at=None) == record


@pytest.mark.parametrize("name", ["", "two words", "../up", "x" * 65, "-x"])
async def test_a_tenants_name_is_plain(store: Store, name: str) -> None:
    with pytest.raises(InvalidRequest, match="letters"):
        await made(store, name)
    assert await store.keys.all() == ()


async def test_nothing_is_no_key(store: Store) -> None:
    tenants, _ = await started(store, GIVEN)
    for nothing in (None, ""):
        with pytest.raises(NotAuthenticated, match="x-api-key"):
            await tenants.authenticate(nothing)
