"""What one tenant may hold at the same time, so that none can take the whole service."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.operations.rates import Rates
from twinkle_dask.types import TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How much of a limit is used."""

    used: int
    limit: int


class Quota:
    """How much of one thing each tenant holds. For the event loop alone.

    Args:
        limit: The most that one tenant may hold.
        what: Of what, in the plural, for the tenant.
        retry_after_s: When it may be worth asking again.
    """

    def __init__(self, limit: int, what: str, *, retry_after_s: float = 1.0) -> None:
        self._limit = limit
        self._what = what
        self._retry_after_s = retry_after_s
        self._held: Counter[TenantId] = Counter()

    @property
    def limit(self) -> int:
        """The most that one tenant may hold."""
        return self._limit

    def held(self, tenant: TenantId) -> int:
        """How much a tenant holds."""
        return self._held[tenant]

    def add(self, tenant: TenantId, amount: int = 1) -> None:
        """Take some; whoever calls this calls ``remove`` with the same amount later.

        A tenant that holds nothing may take any amount, since otherwise it never could.

        Raises:
            QuotaExceeded: It would be more than the limit; nothing was taken.
        """
        held = self._held[tenant]
        if held and held + amount > self._limit:
            raise QuotaExceeded(
                f"You have {held} {self._what}; {self._limit} are the limit. Wait until some of "
                "them are done.",
                self._retry_after_s,
            )
        self._held[tenant] += amount

    def restore(self, tenant: TenantId, amount: int = 1) -> None:
        """Count what a tenant holds since before a restart, whatever the limit."""
        self._held[tenant] += amount

    def remove(self, tenant: TenantId, amount: int = 1) -> None:
        """Give back what ``add`` or ``restore`` took.

        Raises:
            ValueError: That is more than the tenant holds; a fault of ours.
        """
        left = self._held[tenant] - amount
        if left < 0:
            raise ValueError(f"{tenant} holds {left + amount} {self._what}, not {amount}")
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]

    @contextmanager
    def taking(self, tenant: TenantId, amount: int = 1) -> Generator[None]:
        """Take some for longer than the block, unless the block fails.

        Raises:
            QuotaExceeded: As ``add``.
        """
        self.add(tenant, amount)
        try:
            yield
        except BaseException:
            self.remove(tenant, amount)
            raise

    @contextmanager
    def holding(self, tenant: TenantId, amount: int = 1) -> Generator[None]:
        """Hold some for the length of a block.

        Raises:
            QuotaExceeded: As ``add``.
        """
        self.add(tenant, amount)
        try:
            yield
        finally:
            self.remove(tenant, amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """All that is counted per tenant.

    Attributes:
        runs: Of sessions that are alive.
        samples: Requests that wait or are drawn.
        queued_bytes: Payloads of requests that have no outcome yet.
        rates: What is sent in a while.
    """

    runs: Quota
    samples: Quota
    queued_bytes: Quota
    rates: Rates

    @classmethod
    def of(cls, limits: LimitConfig) -> Self:
        """Empty ones, with the configured limits."""
        return cls(
            # Runs end with their session, which takes longer than a step.
            runs=Quota(limits.max_runs, "runs", retry_after_s=30.0),
            samples=Quota(limits.max_samples_in_flight, "samples in flight"),
            queued_bytes=Quota(limits.max_queued_bytes, "bytes of requests in progress"),
            rates=Rates(
                operations_per_s=limits.operations_per_s,
                tokens_per_s=limits.input_tokens_per_s,
                window_s=limits.rate_window_s,
            ),
        )
