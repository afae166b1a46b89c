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


async def authenticated(request: Request, credentials: CredentialsDep) -> Tenant:
    """Find the tenant of the request's ``x-api-key``, which is a key or a token.

    Raises:
        NotAuthenticated: The key is missing or unknown.
        TokenRejected: The token is not valid any more.
    """
    tenant = await credentials.tenant(request.headers.get("x-api-key"))
    structlog.contextvars.bind_contextvars(tenant=tenant.id)
    return tenant


TenantDep = Annotated[Tenant, Depends(authenticated)]
