"""Tokens (JWT) that stand for an API key for a while.

A token names its key, so it dies with the key. Only HS256 with a secret of this service is taken.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jwt

from twinkle_dask.errors import InvalidRequest, NotSupported, TokenRejected
from twinkle_dask.operations.tenants import Tenants
from twinkle_dask.operations.values import Tenant
from twinkle_dask.types import TenantId

# Their types mention those of a package for other algorithms, which is not installed.
_encode: Callable[..., str] = jwt.encode  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_decode: Callable[..., dict[str, Any]] = jwt.decode  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

_ALGORITHM = "HS256"
_REQUIRED = ["exp", "iat", "sub", "org_id", "key_id"]
#: Every JWT begins so, and no API key.
_PREFIX = "eyJ"
#: A token that was verified is known by itself until it expires; at most so many are kept.
_MAX_VERIFIED = 10_000


class _Verified(NamedTuple):
    key_id: int
    expires_s: float


def user_urn(tenant: TenantId) -> str:
    """A tenant in the words of the Tinker protocol."""
    return f"tml:user:{tenant}"


class Credentials:
    """What may stand in ``x-api-key``: a key, or a token that was given for one.

    Args:
        tenants: Who knows the keys.
        secret: To sign tokens with.
        enabled: Whether tokens are given and taken.
        lifetime_s: Of a token.
    """

    def __init__(
        self, tenants: Tenants, secret: bytes, *, enabled: bool, lifetime_s: float
    ) -> None:
        self._tenants = tenants
        self._secret = secret
        self._enabled = enabled
        self._lifetime_s = lifetime_s
        self._verified: OrderedDict[str, _Verified] = OrderedDict()

    async def tenant(self, credential: str | None) -> Tenant:
        """Whose a key or token is.

        Raises:
            NotAuthenticated: There is none, or the key is unknown.
            TokenRejected: The token is not ours, has expired, or its key was revoked.
        """
        if not credential or not credential.startswith(_PREFIX) or not self._enabled:
            return await self._tenants.authenticate(credential)
        known = self._verified.get(credential) or self._verify(credential)
        if known.expires_s <= time.time():
            self._verified.pop(credential, None)
            raise TokenRejected("The token has expired; exchange the API key for a new one.")
        tenant = await self._tenants.of_key(known.key_id)
        if tenant is None:
            raise TokenRejected("The API key that this token was given for is not valid any more.")
        return tenant

    def token(self, tenant: Tenant, credential: str) -> str:
        """A token for the key with which a tenant asks.

        Args:
            tenant: Who asks.
            credential: What they asked with. If that is a token, the new one ends when it does:
                nobody stays longer than their key let them.

        Raises:
            NotSupported: Tokens are switched off.
        """
        if not self._enabled:
            raise NotSupported("This server gives no tokens; send the API key itself.")
        now = time.time()
        expires = now + self._lifetime_s
        known = self._verified.get(credential)
        if known is not None:
            expires = min(expires, known.expires_s)
        if expires <= now:
            raise InvalidRequest("The token has expired.")
        claims: dict[str, object] = {
            "iss": "twinkle-dask",
            "sub": user_urn(tenant.id),
            "org_id": tenant.id,
            "key_id": tenant.key_id,
            "iat": now,
            "exp": expires,
        }
        if tenant.email is not None:
            claims["email"] = tenant.email
        return _encode(claims, self._secret, algorithm=_ALGORITHM)

    def _verify(self, token: str) -> _Verified:
        try:
            claims = _decode(
                token, self._secret, algorithms=[_ALGORITHM], options={"require": _REQUIRED}
            )
            found = _Verified(key_id=int(claims["key_id"]), expires_s=float(claims["exp"]))
        except jwt.ExpiredSignatureError:
            raise TokenRejected(
                "The token has expired; exchange the API key for a new one."
            ) from None
        except (jwt.InvalidTokenError, TypeError, ValueError):
            raise TokenRejected("The token is not one of this server.") from None
        self._verified[token] = found
        while len(self._verified) > _MAX_VERIFIED:
            self._verified.popitem(last=False)
        return found
