"""Every failure in Tinker's words: one table, applied in one place.

What shaped the table (protocol reference, sections 1.5, 1.6 and 11): the SDK repeats 408, 409, 429
and 5xx for at least five minutes, so a failure that will not pass must be another 4xx; and it takes
a 400 without Content-Length for a proxy's glitch, so bodies are whole and uncompressed.
"""

import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import orjson
import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from twinkle_dask import errors
from twinkle_dask_gateway.faults import (
    CLIENT_LEFT,
    check_address,
    describe,
    message_of,
    unexpected,
)

log = structlog.stdlib.get_logger(__name__)

STATUS: Mapping[type[errors.TwinkleDaskError], int] = {
    errors.InvalidRequest: 400,
    errors.NotSupported: 400,
    errors.OutOfOrder: 400,
    errors.Conflict: 400,  # 409 would be repeated
    errors.SessionEnded: 400,  # 410 only on the heartbeat, whose loop it ends
    errors.NotAuthenticated: 401,
    errors.TokenRejected: 401,
    errors.NotPermitted: 403,
    errors.NotFound: 404,
    errors.CheckpointCorrupt: 422,  # ours, but asking again will not help
    errors.QuotaExceeded: 429,
    errors.Saturated: 429,
    errors.HostLost: 500,
    errors.StorageFailed: 500,
    errors.CannotSample: 500,  # of a start, like every StartupError: no request raises it
}


class TinkerRoute(APIRoute):
    """A route that answers whatever is raised in it, dependencies included, from the table."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's own handler."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                check_address(request)
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_LEFT)
            except errors.TwinkleDaskError as error:
                return error_response(error)
            except RequestValidationError as error:
                return _detail(422, describe(error.errors()))
            except HTTPException as error:
                return _detail(error.status_code, error.detail, dict(error.headers or {}))
            except Exception:
                incident = errors.new_incident()
                log.exception("unexpected", incident=incident)
                return _detail(500, unexpected(incident))

        return answer


def error_response(error: errors.TwinkleDaskError, status: int | None = None) -> Response:
    """Answer a failure: ``{"detail": message}``.

    Args:
        error: What happened.
        status: Overrides the table where one route means something else by it.
    """
    status = status or STATUS.get(type(error), 500)
    headers: dict[str, str] = {}
    if isinstance(error, errors.TokenRejected):
        # Tells the SDK to exchange its key for a new token and to send the request again.
        headers["www-authenticate"] = 'Bearer error="invalid_token"'
    if isinstance(error, errors.CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return _detail(status, message_of(error), headers)


def _detail(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    structlog.contextvars.bind_contextvars(error=message[:200])
    return Response(
        orjson.dumps({"detail": message}), status, headers, media_type="application/json"
    )
