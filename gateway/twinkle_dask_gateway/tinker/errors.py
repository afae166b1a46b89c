"""Every failure in Tinker's words: one table, applied in one place.

What shaped the table (protocol reference, sections 1.5, 1.6 and 11): the SDK repeats 408, 409, 429
and 5xx for at least five minutes, so a failure that will not pass must be another 4xx; and it takes
a 400 without Content-Length for a proxy's glitch, so bodies are whole and uncompressed.
"""

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import orjson
import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from twinkle_dask import errors

log = structlog.stdlib.get_logger(__name__)

STATUS: Mapping[type[errors.TwinkleDaskError], int] = {
    errors.InvalidRequest: 400,
    errors.NotSupported: 400,
    errors.OutOfOrder: 400,
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
# No such status exists; nobody is left to read it, but the access log is.
CLIENT_LEFT = 499


class TinkerRoute(APIRoute):
    """A route that answers whatever is raised in it, dependencies included, from the table."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's own handler."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                _check_address(request)
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
                return _detail(500, _our_fault("Something went wrong on our side", incident))

        return answer


def _check_address(request: Request) -> None:
    """Refuse what no database takes as text, wherever in an address it is."""
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
        raise errors.InvalidRequest("An address must not hold the character U+0000.")


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


def message_of(error: errors.TwinkleDaskError) -> str:
    """The tenant's words for a failure; one of ours carries the id under which it is logged."""
    if not isinstance(error, errors.ServiceFault):
        return error.message
    if not error.incident:
        # Kept on the error: a failed result is polled for more than once.
        error.incident = errors.new_incident()
        log.error("fault without incident", incident=error.incident, exc_info=error)
    return _our_fault(error.message.rstrip("."), error.incident)


def describe(problems: Sequence[Any]) -> str:
    """Pydantic's findings as one short sentence, without what the client had sent."""
    found: list[str] = []
    for problem in problems[:3]:
        where = ".".join(str(step)[:60] for step in problem["loc"])
        what = str(problem["msg"]).removeprefix("Value error, ")[:300]
        found.append(f"{where}: {what}" if where else what)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(found) + more


def _our_fault(message: str, incident: str) -> str:
    return f"{message}. If it stays so, tell the operator the incident {incident}."


def _detail(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    structlog.contextvars.bind_contextvars(error=message[:200])
    return Response(
        orjson.dumps({"detail": message}), status, headers, media_type="application/json"
    )
