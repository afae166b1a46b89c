"""What can go wrong, by what the caller can do about it.

::

    ClientError
    ├── NotConfigured        no usable address or key was given; nothing was sent
    ├── Unreachable          no reply: refused, dropped, timed out
    ├── BadReply             a reply that this client cannot read
    ├── RequestRefused       4xx: ask differently
    │   ├── InvalidRequest       400, 422
    │   ├── NotAuthenticated     401
    │   ├── NotPermitted         403
    │   ├── NotFound             404: no such thing, or somebody else's
    │   ├── Conflict             409: it is there already, or something else uses it
    │   └── Gone                 410: ended, expired, or no more items
    ├── TryLater             429, 503: ask again after ``retry_after_s``
    ├── SessionLost          the service ended the session: heartbeats did not reach it in time
    └── ServiceFault         5xx: the service's own failure; the message names its incident
"""

from collections.abc import Mapping

import httpx
from pydantic import BaseModel, ValidationError


class ClientError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        message: What happened, in the service's words where it had any.
        status: HTTP status of the reply, or None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.args = (message, status)  # exactly what __init__ takes, so that it pickles
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


class NotConfigured(ClientError):
    """The address or key cannot be used; nothing was sent."""


class Unreachable(ClientError):
    """No reply came: the connection was refused, dropped, or timed out."""


class BadReply(ClientError):
    """The reply is not one of a twinkle_dask service that this client understands."""


class RequestRefused(ClientError):
    """The service understood and said no; asking the same again gives the same answer."""


class InvalidRequest(RequestRefused):
    """A value in the request is wrong."""


class NotAuthenticated(RequestRefused):
    """The API key is missing or unknown."""


class NotPermitted(RequestRefused):
    """The key is known but may not do this."""


class NotFound(RequestRefused):
    """There is no such thing, or it belongs to another tenant."""


class Conflict(RequestRefused):
    """It is there already, or something else uses it at the moment."""


class Gone(RequestRefused):
    """It was there and has ended or expired; of an iteration: there are no more items."""


class SessionLost(ClientError):
    """The service has ended this client's session, and with it its runs and data sets.

    What was saved is there still: make the run again and load it.
    """


class TryLater(ClientError):
    """Nothing is wrong; the service has no room at the moment.

    Attributes:
        retry_after_s: Seconds the service asked to wait, or None if it did not say.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status)
        self.args = (message, status, retry_after_s)
        self.retry_after_s = retry_after_s


class ServiceFault(ClientError):
    """The service failed; its log has more under the incident that the message names."""


_BY_STATUS: Mapping[int, type[ClientError]] = {
    400: InvalidRequest,
    401: NotAuthenticated,
    403: NotPermitted,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: InvalidRequest,
}


def error_for(response: httpx.Response) -> ClientError:
    """The error that a reply outside of 2xx stands for; its body must have been read."""
    status = response.status_code
    message = _message(response)
    if status in (429, 503):
        return TryLater(message, status, retry_after_s(response))
    if status in _BY_STATUS:
        return _BY_STATUS[status](message, status)
    if 400 <= status < 500:
        return RequestRefused(message, status)
    if status >= 500:
        return ServiceFault(message, status)
    return BadReply(message, status)  # a redirect: this address is not the service's own


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds from ``Retry-After``, or None. The service sends seconds, never a date."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


class _Problem(BaseModel):
    """One entry of a validation report: where, and what."""

    loc: list[str | int]
    msg: str


class _Refusal(BaseModel):
    """The body of a reply that is no success."""

    detail: str | list[_Problem]


def _message(response: httpx.Response) -> str:
    """The service's own words, or the status line if the body is not the service's."""
    try:
        detail = _Refusal.model_validate_json(response.content).detail
    except ValidationError:
        detail = ""
    if not isinstance(detail, str):
        detail = "; ".join(f"{'.'.join(map(str, each.loc))}: {each.msg}" for each in detail)
    return detail or f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
