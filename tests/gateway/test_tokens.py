"""Tokens in place of keys."""

import base64
import json
import time
from typing import Any

import httpx
import jwt
import pytest

from tests.gateway.in_memory import KEY, TENANT, InMemoryService
from twinkle_dask.errors import NotAuthenticated, NotSupported, TokenRejected
from twinkle_dask_gateway.app import create_app
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.tokens import Credentials

# Its type mentions one of a package that is not installed.
_encode: Any = jwt.encode  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def credentials(world: InMemoryService, *, lifetime_s: float = 600.0) -> Credentials:
    return Credentials(
        world.service.tenants, world.token_secret, enabled=True, lifetime_s=lifetime_s
    )


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def forged(world: InMemoryService, secret: bytes | None = None, **claims: Any) -> str:
    now = time.time()
    base = {"sub": "x", "org_id": "t", "key_id": TENANT.key_id, "iat": now, "exp": now + 60}
    told = {name: value for name, value in (base | claims).items() if value is not None}
    return _encode(told, secret or world.token_secret, algorithm="HS256")


async def test_a_token_stands_for_its_key(world: InMemoryService) -> None:
    given = credentials(world)
    token = given.token(TENANT, KEY)
    for _ in range(2):  # the second time from memory
        assert await given.tenant(token) == TENANT
    claims = claims_of(token)
    assert claims["sub"] == "tml:user:t"
    assert claims["org_id"] == "t"
    assert "email" not in claims
    assert claims["exp"] - claims["iat"] == pytest.approx(600)


async def test_a_token_ends_with_its_key(world: InMemoryService) -> None:
    given = credentials(world)
    token = given.token(TENANT, KEY)
    await given.tenant(token)
    world.revoked = True
    with pytest.raises(TokenRejected, match="key"):
        await given.tenant(token)


async def test_a_token_of_a_token_lives_no_longer(world: InMemoryService) -> None:
    first = credentials(world, lifetime_s=100).token(TENANT, KEY)
    later = credentials(world, lifetime_s=1000)
    await later.tenant(first)
    assert claims_of(later.token(TENANT, first))["exp"] == pytest.approx(claims_of(first)["exp"])


async def test_what_was_verified_expires_all_the_same(
    world: InMemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = credentials(world)
    token = forged(world)
    await given.tenant(token)
    monkeypatch.setattr("twinkle_dask_gateway.tokens.time.time", lambda: claims_of(token)["exp"])
    with pytest.raises(TokenRejected, match="expired"):
        await given.tenant(token)


@pytest.mark.parametrize(
    "claims",
    [{"exp": 1}, {"exp": None}, {"key_id": None}, {"key_id": "x"}, {"key_id": 8}, {"iat": 9e12}],
    ids=str,
)
async def test_other_claims_are_rejected(world: InMemoryService, claims: dict[str, Any]) -> None:
    with pytest.raises(TokenRejected):
        await credentials(world).tenant(forged(world, **claims))


async def test_other_signatures_are_rejected(world: InMemoryService) -> None:
    head = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    good = forged(world)
    unsigned = ".".join([head, good.split(".")[1], ""])
    other = _encode(claims_of(good), world.token_secret + bytes(32), algorithm="HS512")
    for token in (forged(world, b"x" * 32), unsigned, other, good[:-3] + "abc", "eyJ", "eyJ.a.b"):
        with pytest.raises(TokenRejected):
            await credentials(world).tenant(token)


async def test_switched_off_nothing_is_given_or_taken(world: InMemoryService) -> None:
    off = Credentials(world.service.tenants, world.token_secret, enabled=False, lifetime_s=60)
    with pytest.raises(NotSupported):
        off.token(TENANT, KEY)
    with pytest.raises(NotAuthenticated):
        await off.tenant(forged(world))


async def test_a_rejected_token_is_told_so_that_clients_know(client: httpx.AsyncClient) -> None:
    answer = await client.get("/sessions", headers={"x-api-key": "eyJwrong"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    unknown = await client.get("/sessions", headers={"x-api-key": "tml-wrong"})
    assert unknown.status_code == 401
    assert "www-authenticate" not in unknown.headers


async def test_a_key_is_exchanged(client: httpx.AsyncClient, world: InMemoryService) -> None:
    token = (await client.post("/auth/token", json={})).json()["jwt"]
    with_token = {"x-api-key": token}
    me = (await client.get("/auth/apikey/me", headers=with_token)).json()
    assert me == {
        "key_id": 7,
        "name": "laptop",
        "note": "",
        "details": {"org_details": {"name": "t"}, "user_details": {"email": "t"}},
    }
    assert (await client.delete("/auth/apikey/me", headers=with_token)).status_code == 200
    assert (await client.get("/auth/apikey/me", headers=with_token)).status_code == 401


async def test_an_operators_notice_is_told(world: InMemoryService) -> None:
    config = GatewayConfig(info_message="i", error_message="e", tokens=False)
    transport = httpx.ASGITransport(create_app(world.service, config))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway/api/v1", headers={"x-api-key": KEY}
    ) as client:
        told = (await client.post("/create_session", json={})).json()
        assert told["info_message"] == "i"
        assert told["warning_message"] is None
        assert told["error_message"] == "e"
        flags = (await client.post("/client/config", json={})).json()
        assert flags["pjwt_auth_enabled"] is False
