"""Who may start next: tenants in rotation, each with a bound of its own. Pure but for waiting."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.types import TenantId


class Turns:
    """Hands out a number of places.

    A place that becomes free goes to the tenant that has waited longest since its last turn and is
    below its own bound; tasks of one tenant start in the order in which they came. Who must be
    alone starts once everybody has left, and nobody starts before that.

    Attributes:
        places: How many turns there are at the same time; may change.

    Args:
        per_tenant: Most turns of one tenant at the same time.
        max_waiting: Most tasks of one tenant that wait.
    """

    def __init__(self, *, per_tenant: int, max_waiting: int) -> None:
        self.places = 1
        self._per_tenant = per_tenant
        self._max_waiting = max_waiting
        self._running: Counter[TenantId] = Counter()
        self._waiting: dict[TenantId, deque[asyncio.Future[None]]] = {}
        self._last_turn: dict[TenantId, int] = {}
        self._num_turns = 0
        self._alone: deque[asyncio.Future[None]] = deque()
        self._one_is_alone = False

    @asynccontextmanager
    async def turn(self, tenant: TenantId, *, alone: bool = False) -> AsyncGenerator[None]:
        """Wait for a turn and hold it for the block.

        Args:
            tenant: Whose task it is.
            alone: No other turn is held meanwhile.

        Raises:
            QuotaExceeded: Too many tasks of this tenant wait.
        """
        queue = self._alone if alone else self._waiting.setdefault(tenant, deque())
        if not alone and len(queue) >= self._max_waiting:
            raise QuotaExceeded(
                f"{len(queue)} tasks of yours wait for a CPU worker, which is as many as may; wait "
                "for some of them."
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(place)
        self._grant()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                queue.remove(place)
                self._grant()
            else:  # it was granted in the same moment
                self._leave(tenant, alone)
            raise
        try:
            yield
        finally:
            self._leave(tenant, alone)

    def _leave(self, tenant: TenantId, alone: bool) -> None:
        if alone:
            self._one_is_alone = False
        else:
            self._running[tenant] -= 1
        self._grant()

    def _grant(self) -> None:
        if self._one_is_alone:
            return
        if self._alone:
            if self._running.total() == 0:
                self._one_is_alone = True
                self._alone.popleft().set_result(None)
            return
        while self._running.total() < self.places and (tenant := self._next()) is not None:
            self._running[tenant] += 1  # not when its waiter wakes up, or two would get the place
            self._waiting[tenant].popleft().set_result(None)
            self._num_turns += 1
            self._last_turn[tenant] = self._num_turns

    def _next(self) -> TenantId | None:
        may = [t for t, q in self._waiting.items() if q and self._running[t] < self._per_tenant]
        return min(may, key=lambda tenant: self._last_turn.get(tenant, 0), default=None)
