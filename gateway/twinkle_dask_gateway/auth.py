"""Who is asking. Every router of every face carries ``authenticated`` for all of its routes."""

from typing import Annotated, cast

import structlog
from fastapi import Depends, Request

from twinkle_dask.operations.values import Tenant
from twinkle_dask_gateway.tokens import Credentials


async def credentials_of(request: Request) -> Credentials:
    """What tells whose a key or token is; also for one that stands elsewhere in a request."""
    return cast(Credentials, request.app.state.credentials)


CredentialsDep = Annotated[Credentials, Depends(credentials_of)]


def credential_of(request: Request) -> str | None:
    """What a request shows: ``x-api-key``, else what Twinkle's clients send as a bearer.

    They send it in two headers; the first is theirs alone, since proxies like to use the second.
    """
    headers = request.headers
    if (key := headers.get("x-api-key")) is not None:
        return key
    told = headers.get("twinkle-authorization") or headers.get("authorization")
    if told is None:
        return None
    scheme, space, rest = told.strip().partition(" ")
    return rest.strip() if space and scheme.lower() == "bearer" else told.strip()


async def authenticated(request: Request, credentials: CredentialsDep) -> Tenant:
    """Find the tenant of the request's key or token.

    Raises:
        NotAuthenticated: The key is missing or unknown.
        TokenRejected: The token is not valid any more.
    """
    tenant = await credentials.tenant(credential_of(request))
    structlog.contextvars.bind_contextvars(tenant=tenant.id)
    return tenant


TenantDep = Annotated[Tenant, Depends(authenticated)]
