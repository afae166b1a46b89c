"""One structured line per request, and an id that ties everything logged during it together."""

import re
import time
from uuid import uuid4

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.stdlib.get_logger(__name__)

# Background traffic: one line each would drown the rest.
_QUIET = ("/retrieve_future", "/session_heartbeat", "/telemetry", "/healthz", "/dynamic_config")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AccessLog:
    """ASGI middleware: takes or makes the request id, answers it back, logs the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"").decode("latin-1")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid4().hex
        status = 0  # stays so when the client left before the answer
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        # A connection on which a large body was read hands that request's context to later ones.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path: str = scope["path"]
            quiet = path.endswith(_QUIET) and status in {200, 408}
            write = log.debug if quiet else log.info
            duration_ms = round((time.perf_counter() - started) * 1000, 2)
            write(
                "request", method=scope["method"], path=path, status=status, duration_ms=duration_ms
            )
