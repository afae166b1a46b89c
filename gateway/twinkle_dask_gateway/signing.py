"""URLs that need no key: whoever has one may fetch what it names, until it expires."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import quote, urlencode

from fastapi import Request

from twinkle_dask.errors import NotPermitted
from twinkle_dask_gateway.config import GatewayConfig


class Signed(NamedTuple):
    """A URL, and when it stops working."""

    url: str
    expires: datetime


class Signer:
    """Signs paths with a secret of this service, and holds requests against it.

    What is signed is the path with its ``query`` and the time, so a URL opens nothing else.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, base: str, path: str, query: Mapping[str, str], lifetime_s: float) -> Signed:
        """A URL for ``path`` below ``base``.

        Args:
            base: The server as this client reaches it; see ``base_of``.
            path: From ``/``, as routes see it (without a prefix), no part of it quoted.
            query: More of the request that must not be changed.
            lifetime_s: How long it works.
        """
        expires = int(time.time() + lifetime_s)
        parts = {**query, "expires": str(expires)}
        signature = self._signature(path, parts)
        url = f"{base}{quote(path, safe='/:')}?{urlencode({**parts, 'signature': signature})}"
        return Signed(url=url, expires=datetime.fromtimestamp(expires, UTC))

    def check(self, path: str, query: Mapping[str, str]) -> None:
        """Hold a request against its signature.

        Raises:
            NotPermitted: It was not signed so, or it is too late.
        """
        parts = dict(query)
        signature = parts.pop("signature", "")
        expected = self._signature(path, parts)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise NotPermitted("This URL was not signed by this server; ask for a new one.")
        if int(parts["expires"]) < time.time():
            raise NotPermitted("This URL has expired; ask for a new one.")

    def _signature(self, path: str, parts: Mapping[str, str]) -> str:
        told = json.dumps([path, sorted(parts.items())]).encode()
        digest = hmac.digest(self._secret, told, hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def base_of(request: Request) -> str:
    """What comes before ``/api/v1`` in URLs for the client of this request."""
    config: GatewayConfig = request.app.state.config
    return config.public_url or str(request.base_url).rstrip("/") + config.url_prefix
