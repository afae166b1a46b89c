"""Saved checkpoints: listing, sharing, copying, expiry, downloads. Run ids hold ':'."""

from email.utils import format_datetime
from typing import Annotated, Final

from fastapi import APIRouter, Header, Request, Response

from twinkle_dask.types import RunId, SessionId
from twinkle_dask_gateway.auth import CredentialsDep, TenantDep
from twinkle_dask_gateway.deps import ServiceDep, SignerDep
from twinkle_dask_gateway.openapi import takes
from twinkle_dask_gateway.reading import read
from twinkle_dask_gateway.signing import Signed, Signer, base_of
from twinkle_dask_gateway.tinker import codec, replies, wire
from twinkle_dask_gateway.tinker.addresses import address_of, format_address, parse_address
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.paging import Limit, Offset
from twinkle_dask_gateway.tinker.readers import reader_of
from twinkle_dask_gateway.tinker.routes_downloads import DOWNLOADS
from twinkle_dask_gateway.tinker.sdk_versions import KnowsExports

routes = APIRouter(route_class=TinkerRoute)

_CHECKPOINT: Final = "/training_runs/{run}/checkpoints/{kind}/{name}"
#: How long the URL of a download works; clients ask again when little of it is left.
_URL_LIFETIME_S = 3600.0
_MAX_TOKEN_LENGTH = 8192


@routes.get("/training_runs/{run}/checkpoints")
async def list_run_checkpoints(
    run: str, service: ServiceDep, tenant: TenantDep, exports: KnowsExports
) -> replies.Checkpoints:
    """The checkpoints of one run; of another tenant's run those that are public."""
    found = await service.checkpoints.of_run(tenant, RunId(run), exports=exports)
    return replies.Checkpoints(checkpoints=[codec.checkpoint(info) for info in found])


@routes.delete(_CHECKPOINT)
async def delete_checkpoint(
    run: str, kind: str, name: str, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """Remove a checkpoint for good."""
    await service.checkpoints.delete(tenant, address_of(run, kind, name))
    return replies.Empty()


@routes.put(f"{_CHECKPOINT}/ttl", openapi_extra=takes(wire.SetTtl))
async def set_checkpoint_ttl(
    run: str, kind: str, name: str, request: Request, service: ServiceDep, tenant: TenantDep
) -> replies.Empty:
    """Let a checkpoint expire, counted from now, or keep it (null)."""
    body = await read(request, wire.SetTtl)
    address = address_of(run, kind, name)
    await service.checkpoints.set_ttl(tenant, address, body.ttl_seconds)
    return replies.Empty()


@routes.post(f"{_CHECKPOINT}/publish", status_code=204)
async def publish_checkpoint(
    run: str, kind: str, name: str, service: ServiceDep, tenant: TenantDep
) -> None:
    """Let every tenant read a checkpoint. One that is public already stays so."""
    await service.checkpoints.set_public(tenant, address_of(run, kind, name), public=True)


@routes.delete(f"{_CHECKPOINT}/publish", status_code=204)
async def unpublish_checkpoint(
    run: str, kind: str, name: str, service: ServiceDep, tenant: TenantDep
) -> None:
    """Let nobody else read a checkpoint any more; what they made of it stays theirs."""
    await service.checkpoints.set_public(tenant, address_of(run, kind, name), public=False)


@routes.get("/checkpoints")
async def list_checkpoints(
    service: ServiceDep,
    tenant: TenantDep,
    exports: KnowsExports,
    limit: Limit = 100,
    offset: Offset = 0,
) -> replies.Checkpoints:
    """The tenant's checkpoints over all runs."""
    page = await service.checkpoints.page(tenant, limit, offset, exports=exports)
    return replies.Checkpoints(
        checkpoints=[codec.checkpoint(info) for info in page.items], cursor=codec.cursor(page)
    )


@routes.post("/copy_weights", openapi_extra=takes(wire.CopyWeights))
async def copy_weights(
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    credentials: CredentialsDep,
    x_tinker_weights_access_token: Annotated[
        str | None, Header(max_length=_MAX_TOKEN_LENGTH)
    ] = None,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> replies.WeightsCopied:
    """Copy a checkpoint to a new run that cannot be trained. The files are shared."""
    body = await read(request, wire.CopyWeights)
    token = x_tinker_weights_access_token or body.weights_access_token
    reader = await reader_of(tenant, token, credentials)
    source = parse_address(body.source_path)
    if body.session_id is not None and body.model_seq_id is not None:
        copy = await service.copying.into_session(
            tenant,
            source,
            reader=reader,
            session=SessionId(body.session_id),
            seq=body.model_seq_id,
            ttl_s=body.ttl_seconds,
        )
    else:
        copy = await service.copying.into_project(
            tenant,
            source,
            reader=reader,
            project=body.destination_project_id or "",
            ttl_s=body.ttl_seconds,
            idempotency_key=x_idempotency_key,
        )
    return replies.WeightsCopied(tinker_path=format_address(copy))


@routes.get(f"{_CHECKPOINT}/external_weights_urls")
async def external_weights_urls(
    run: str,
    kind: str,
    name: str,
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    signer: SignerDep,
) -> replies.ExternalWeightsUrls:
    """A URL for each file of exported weights, to be fetched without a key."""
    granted = await service.downloads.files(tenant, address_of(run, kind, name))
    signed = {file: _sign(signer, request, granted.checkpoint, file) for file in granted.files}
    return replies.ExternalWeightsUrls(
        urls={file: one.url for file, one in signed.items()},
        expires=min(one.expires for one in signed.values()),
    )


@routes.get(f"{_CHECKPOINT}/archive", status_code=302, response_class=Response)
async def checkpoint_archive(
    run: str,
    kind: str,
    name: str,
    request: Request,
    service: ServiceDep,
    tenant: TenantDep,
    signer: SignerDep,
) -> Response:
    """Where older clients fetch a checkpoint's adapter as a tar file, without a key."""
    granted = await service.downloads.archive(tenant, address_of(run, kind, name))
    (file,) = granted.files
    signed = _sign(signer, request, granted.checkpoint, file)
    expires = format_datetime(signed.expires, usegmt=True)
    return Response(status_code=302, headers={"location": signed.url, "expires": expires})


def _sign(signer: Signer, request: Request, checkpoint: str, file: str) -> Signed:
    path = f"/api/v1{DOWNLOADS}/{checkpoint}/{file}"
    return signer.sign(base_of(request), path, {}, _URL_LIFETIME_S)
