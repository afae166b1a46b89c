"""Who is asking. Every router of every face carries ``authenticated`` for all of its routes."""

from typing import Annotated

import structlog
from fastapi import Depends, Request

from twinkle_dask.operations.values import Tenant
from twinkle_dask_gateway.deps import ServiceDep


async def authenticated(request: Request, service: ServiceDep) -> Tenant:
    """Find the tenant of the request's ``x-api-key``.

    Raises:
        NotAuthenticated: The key is missing or unknown.
    """
    tenant = service.tenants.authenticate(request.headers.get("x-api-key"))
    structlog.contextvars.bind_contextvars(tenant=tenant.id)
    return tenant


TenantDep = Annotated[Tenant, Depends(authenticated)]
