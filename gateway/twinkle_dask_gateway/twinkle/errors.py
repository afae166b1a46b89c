"""Every failure in Twinkle's words: one table, applied in one place.

What shaped the table (protocol reference, section 1.0): the client never repeats a request and
shows status and ``detail`` of whatever is not 200, so a status may mean what HTTP says it means;
but it takes 410 for the end of an iteration, so nothing else may answer that.
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
from twinkle_dask_gateway.faults import CLIENT_LEFT, check_address, message_of, unexpected

log = structlog.stdlib.get_logger(__name__)

STATUS: Mapping[type[errors.TwinkleDaskError], int] = {
    errors.InvalidRequest: 400,
    errors.NotSupported: 400,
    errors.NotAuthenticated: 401,
    errors.TokenRejected: 401,
    errors.NotPermitted: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.OutOfOrder: 409,
    errors.SessionEnded: 409,  # 404 on the heartbeat
    errors.QuotaExceeded: 429,
    errors.Saturated: 503,
    errors.CheckpointCorrupt: 500,
    errors.HostLost: 500,
    errors.StorageFailed: 500,
    errors.CannotSample: 500,  # of a start, like every StartupError: no request raises it
}
#: The end of an iteration, which the client makes StopIteration of.
EXHAUSTED = 410
_MAX_FINDINGS = 10
_MAX_SHOWN = 200


class TwinkleRoute(APIRoute):
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
                return _detail(422, findings(error.errors()))
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
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, errors.CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return _detail(status, message_of(error), headers)


def findings(problems: Any) -> list[dict[str, Any]]:
    """Pydantic's findings as this protocol has them; what was sent is told only if it is short."""
    told: list[dict[str, Any]] = []
    for problem in list(problems)[:_MAX_FINDINGS]:
        found: dict[str, Any] = {
            "type": problem["type"],
            "loc": [step if isinstance(step, int) else str(step)[:60] for step in problem["loc"]],
            "msg": str(problem["msg"])[:300],
        }
        shown = problem.get("input")
        small = isinstance(shown, str) and len(shown) <= _MAX_SHOWN
        if shown is None or small or isinstance(shown, bool | int | float):
            found["input"] = shown
        told.append(found)
    return told


def _detail(
    status: int, detail: str | list[dict[str, Any]], headers: Mapping[str, str] | None = None
) -> Response:
    structlog.contextvars.bind_contextvars(error=str(detail)[:200])
    return Response(
        orjson.dumps({"detail": detail}), status, headers, media_type="application/json"
    )
