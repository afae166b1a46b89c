"""Every failure in OpenAI's words: ``{"error": {message, type, param, code}}``, from one table.

Its clients repeat 408, 409, 429 and 5xx a few times, so what will not pass is another 4xx.
"""

import math
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from twinkle_dask import errors
from twinkle_dask_gateway.faults import CLIENT_LEFT, check_address, message_of, unexpected

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """How a class of failures is shown."""

    status: int
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"
_OURS = Shown(500, "server_error")
SHOWN: Mapping[type[errors.TwinkleDaskError], Shown] = {
    errors.InvalidRequest: Shown(400, _INVALID),
    errors.NotSupported: Shown(400, _INVALID, "unsupported_value"),
    errors.OutOfOrder: Shown(400, _INVALID),
    errors.Conflict: Shown(400, _INVALID),
    errors.SessionEnded: Shown(503, "server_error"),  # the next call finds a new one
    errors.NotAuthenticated: Shown(401, _INVALID, "invalid_api_key"),
    errors.TokenRejected: Shown(401, _INVALID, "invalid_api_key"),
    errors.NotPermitted: Shown(403, _INVALID),
    errors.NotFound: Shown(404, _INVALID, "model_not_found"),
    errors.QuotaExceeded: Shown(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Saturated: Shown(503, "server_error"),
    errors.CheckpointCorrupt: Shown(400, "server_error"),  # asking again will not help
    errors.HostLost: _OURS,
    errors.StorageFailed: _OURS,
    errors.CannotSample: _OURS,
}


class WrongField(Exception):
    """A field of the request is wrong; names it.

    Not of ``twinkle_dask.errors``: this face alone tells fields apart.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param


class ChatRoute(APIRoute):
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
            except WrongField as error:
                return _json(400, _body(error.message, _INVALID, error.param, None))
            except errors.TwinkleDaskError as error:
                return _response(error)
            except HTTPException as error:
                body = _body(str(error.detail), _INVALID, None, None)
                return _json(error.status_code, body, error.headers)
            except Exception:
                incident = errors.new_incident()
                log.exception("unexpected", incident=incident)
                return _json(500, _body(unexpected(incident), "server_error", None, None))

        return answer


def body_of(error: errors.TwinkleDaskError) -> dict[str, Any]:
    """A failure as clients read it, also within a stream."""
    shown = _shown(error)
    param = "model" if shown.code == "model_not_found" else None
    return _body(message_of(error), shown.type, param, shown.code)


def _response(error: errors.TwinkleDaskError) -> Response:
    headers: dict[str, str] = {}
    shown = _shown(error)
    if shown.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, errors.CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return _json(shown.status, body_of(error), headers)


def _shown(error: errors.TwinkleDaskError) -> Shown:
    return SHOWN.get(type(error), _OURS)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _json(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    structlog.contextvars.bind_contextvars(error=body["error"]["message"][:200])
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
