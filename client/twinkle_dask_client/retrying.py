"""When a request is tried again. No I/O and no clock: the services sleep, this only says how long.

Only what can be repeated without harm is repeated, and only where time can help. What changes
something (a step, a gradient) is sent again only if the service cannot have begun it: there was no
connection yet, or it said 429. Anything else is sent again after 503 and broken connections too.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.errors import BadReply, TryLater, Unreachable, error_for

# The rest of httpx.RequestError, for example an unknown scheme, is the same on every attempt.
_PASSING = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
# Nothing was sent.
_BEFORE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_TOO_MANY = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How patient to be.

    Attributes:
        attempts: Requests at most, the first included.
        first_pause_s: Pause before the second one; doubles from then on.
        longest_pause_s: No pause is longer, and a ``Retry-After`` above it is not waited for.
    """

    attempts: int = 4
    first_pause_s: float = 0.25
    longest_pause_s: float = 30.0

    def pause_s(self, attempt: int, jitter: float) -> float:
        """Pause after failed attempt 1, 2, ...; ``jitter`` in [0, 1) takes off up to a half."""
        full_s = min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s)
        return full_s * (1 - jitter / 2)


class Attempts:
    """The story of one call: told what each attempt gave, says what to do next."""

    def __init__(
        self, call: Call[Any], policy: RetryPolicy, jitter: Callable[[], float] = random.random
    ) -> None:
        self._call = call
        self._policy = policy
        self._jitter = jitter
        self._made = 0

    def after_error(self, error: httpx.RequestError) -> float:
        """Seconds to wait before trying again.

        Raises:
            Unreachable: There is no point in trying again.
            BadReply: The reply's content encoding is broken.
        """
        self._made += 1
        if isinstance(error, httpx.DecodingError):
            raise BadReply(f"{self._call.path} gave a reply that cannot be decoded") from error
        harmless = self._call.repeatable or isinstance(error, _BEFORE)
        if isinstance(error, _PASSING) and harmless and self._attempts_left:
            return self._pause_s
        what = str(error) or type(error).__name__
        tries = f" ({self._made} attempts)" if self._made > 1 else ""
        raise Unreachable(f"No reply from {_asked(error)}{tries}: {what}") from error

    def after_reply(self, response: httpx.Response) -> float | None:
        """Seconds to wait before trying again, or None if the reply is good.

        Raises:
            ClientError: What the reply stands for, if there is no point in trying again.
        """
        self._made += 1
        if response.is_success:
            return None
        error = error_for(response)
        harmless = self._call.repeatable or response.status_code == _TOO_MANY
        if isinstance(error, TryLater) and harmless and self._attempts_left:
            asked_s = error.retry_after_s
            if asked_s is None:
                return self._pause_s
            if asked_s <= self._policy.longest_pause_s:
                return asked_s
        raise error

    @property
    def _attempts_left(self) -> bool:
        return self._made < self._policy.attempts

    @property
    def _pause_s(self) -> float:
        return self._policy.pause_s(self._made, self._jitter())


def _asked(error: httpx.RequestError) -> str:
    """Who was asked, so that a wrong address shows."""
    try:
        url = error.request.url
    except RuntimeError:  # raised before there was a request
        return "the service"
    return f"{url.scheme}://{url.netloc.decode()}"
