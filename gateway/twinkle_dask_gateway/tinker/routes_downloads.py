"""Downloads of signed URLs: plain GET without a key, whole or in part."""

import re
from typing import Annotated, Final

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from twinkle_dask_gateway.deps import ServiceDep, SignerDep
from twinkle_dask_gateway.tinker.errors import TinkerRoute

open_routes = APIRouter(route_class=TinkerRoute)

DOWNLOADS: Final = "/downloads"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@open_routes.get(
    DOWNLOADS + "/{checkpoint}/{file}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The part that `Range` asks for."},
        403: {"description": "The URL was not signed here, or has expired."},
        404: {"description": "The checkpoint is not there any more."},
        416: {"description": "The file has no such part."},
    },
)
async def download(
    checkpoint: str,
    file: str,
    request: Request,
    service: ServiceDep,
    signer: SignerDep,
    byte_range: Annotated[str | None, Header(alias="range", max_length=64)] = None,
) -> Response:
    """A file of a checkpoint, for whoever has its URL."""
    signer.check(f"/api/v1{DOWNLOADS}/{checkpoint}/{file}", request.query_params)
    content = await service.downloads.open(checkpoint, file)
    size = content.num_bytes
    start, stop = _part(byte_range, size)
    if start >= stop:
        return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private",
        "content-disposition": f'attachment; filename="{file}"',
        "content-length": str(stop - start),
    }
    status = 200
    if (start, stop) != (0, size):
        status = 206
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    return StreamingResponse(
        content.read(start, stop), status, headers, media_type="application/octet-stream"
    )


def _part(byte_range: str | None, size: int) -> tuple[int, int]:
    """What a Range header asks for; all of it if it asks for nothing, or for several parts."""
    found = _RANGE.fullmatch(byte_range or "")
    if found is None or found.groups() == ("", ""):
        return 0, size
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return 0, size  # to be ignored, says RFC 9110
    return int(first), min(size, int(last) + 1) if last else size
