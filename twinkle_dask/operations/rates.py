"""How much a tenant may send in a while, counted over a window that slides."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.types import TenantId

#: Tenants that sent nothing for a window are forgotten when there are more than so many.
_MAX_IDLE = 1000


@dataclass(slots=True)
class _Window:
    sent: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])
    tokens: int = 0

    def forget(self, before_s: float) -> None:
        while self.sent and self.sent[0][0] <= before_s:
            self.tokens -= self.sent.popleft()[1]


class Rates:
    """Admits operations by tenant. For the event loop alone.

    Args:
        operations_per_s: On average over the window; None is no limit.
        tokens_per_s: The same of their tokens.
        window_s: What the average is taken over.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        *,
        operations_per_s: float | None,
        tokens_per_s: float | None,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # At least one, or nobody could ever do anything.
        self._operations = _in_window(operations_per_s, window_s)
        self._tokens = _in_window(tokens_per_s, window_s)
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[TenantId, _Window] = {}

    def admit(self, tenant: TenantId, tokens: int) -> None:
        """Count an operation of so many tokens.

        One that is larger than the limit is admitted when the window is empty, since otherwise it
        never could be.

        Raises:
            QuotaExceeded: It would be too much; nothing was counted. Carries when it is worth
                asking again.
        """
        if self._operations is None and self._tokens is None:
            return
        now_s = self._clock()
        window = self._window(tenant, now_s)
        if self._operations is not None and len(window.sent) >= self._operations:
            self._refuse(window, now_s, f"{self._operations} operations")
        if self._tokens is not None and window.tokens + tokens > self._tokens and window.tokens:
            self._refuse(window, now_s, f"{self._tokens} input tokens")
        window.sent.append((now_s, tokens))
        window.tokens += tokens

    def _refuse(self, window: _Window, now_s: float, limit: str) -> None:
        wait_s = max(0.0, window.sent[0][0] + self._window_s - now_s)
        raise QuotaExceeded(
            f"Rate limit exceeded: {limit} in {self._window_s:g} s are your limit. Send it again "
            "in a moment.",
            wait_s,
        )

    def _window(self, tenant: TenantId, now_s: float) -> _Window:
        if len(self._windows) > _MAX_IDLE:
            for window in self._windows.values():
                window.forget(now_s - self._window_s)
            self._windows = {of: window for of, window in self._windows.items() if window.sent}
        window = self._windows.setdefault(tenant, _Window())
        window.forget(now_s - self._window_s)
        return window


def _in_window(per_s: float | None, window_s: float) -> int | None:
    return None if per_s is None else max(1, math.floor(per_s * window_s))
