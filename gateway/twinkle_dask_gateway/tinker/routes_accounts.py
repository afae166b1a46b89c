"""Who asks, what they did, and what they used."""

from datetime import date, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from twinkle_dask_gateway.auth import CredentialsDep, TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import takes
from twinkle_dask_gateway.tinker import codec_accounts, replies
from twinkle_dask_gateway.tinker.errors import TinkerRoute

routes = APIRouter(route_class=TinkerRoute)


@routes.post("/auth/token", openapi_extra=takes(required=False))
async def auth_token(
    request: Request, tenant: TenantDep, credentials: CredentialsDep
) -> replies.Token:
    """A token that stands for the API key for a while."""
    await request.body()
    return replies.Token(jwt=credentials.token(tenant, request.headers.get("x-api-key", "")))


@routes.get("/auth/apikey/me")
async def get_own_key(service: ServiceDep, tenant: TenantDep) -> replies.OwnKey:
    """What is known of the key with which the request was made."""
    return codec_accounts.own_key(await service.tenants.key(tenant))


@routes.delete("/auth/apikey/me")
async def delete_own_key(service: ServiceDep, tenant: TenantDep) -> replies.Empty:
    """End the key with which the request was made, and its tokens."""
    await service.tenants.revoke(tenant)
    return replies.Empty()


@routes.get("/audit")
async def audit(
    service: ServiceDep,
    tenant: TenantDep,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> replies.AuditLog:
    """What the tenant did on one day (UTC), newest first."""
    if event_type == "teams":  # there are none here
        return replies.AuditLog(entries=[])
    family = codec_accounts.FAMILIES[event_type]
    found = await service.audit.of_day(tenant, day, family=family)
    return replies.AuditLog(entries=[codec_accounts.audit_entry(event) for event in found])


@routes.get("/billing/usage/events")
async def usage_events(
    service: ServiceDep,
    tenant: TenantDep,
    starting_on: Annotated[datetime, Query()],
    ending_before: Annotated[datetime, Query()],
) -> replies.UsageEvents:
    """What the tenant used, by the hour."""
    report = await service.usage.between(tenant, starting_on, ending_before)
    return codec_accounts.usage_events(tenant, report)


@routes.get("/billing/usage/checkpoints/current")
async def current_checkpoint_storage(
    service: ServiceDep, tenant: TenantDep, project_id: str | None = None
) -> replies.CheckpointStorage:
    """What the tenant's checkpoints take now, by project."""
    stored = await service.usage.stored(tenant, project_id)
    return codec_accounts.checkpoint_storage(tenant, stored)
