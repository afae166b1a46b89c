"""A cap on what a client may send, enforced while it is sending."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: 413 as soon as a body is, or says it will be, larger than ``max_bytes``.

    It raises ``HTTPException`` into whoever reads the body, so that the face answers in its words.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((int(v) for k, v in scope["headers"] if k == b"content-length"), 0)
        received = 0

        async def limited() -> Message:
            nonlocal received
            if announced > self._max_bytes:
                raise self._too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> HTTPException:
        mib = self._max_bytes / 2**20
        return HTTPException(
            413, f"The request body is larger than {mib:.1f} MiB. Send it in several requests."
        )
