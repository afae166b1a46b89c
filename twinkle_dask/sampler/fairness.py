"""Whose turn it is: fair between tenants by tokens. Pure; no torch, no clock.

Every token that a tenant's requests cost, read or written, is added to its account. What waits is
offered in order of the accounts, the least served first; within a tenant in order of arrival. A
tenant that comes, or comes back from idleness, starts level with the least served one present (or
where it stood, if that is ahead): neither idleness nor use of an empty machine is held for or
against anybody.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from twinkle_dask.types import TenantId

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Account(Generic[Item]):
    """What one tenant has had, and what it waits for.

    Attributes:
        served: Tokens charged; whoever spends them adds them here.
        live: Requests that are not finished, whether they wait or not; the owner counts them.
        waiting: In order of arrival.
    """

    tenant: TenantId
    served: int
    live: int = 0
    waiting: deque[Item] = field(default_factory=deque[Item])


class FairQueue(Generic[Item]):
    """What waits, by tenant."""

    def __init__(self) -> None:
        self._accounts: dict[TenantId, Account[Item]] = {}

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def account(self, tenant: TenantId) -> Account[Item]:
        """A tenant's account, brought level if it was idle. Raise ``live`` before asking again."""
        account = self._accounts.get(tenant)
        if account is not None and account.live:
            return account
        present = [a.served for a in self._accounts.values() if a.live]
        if not present:
            self._accounts.clear()
        floor = min(present, default=0)
        # An idle tenant is remembered only while it is ahead of those present.
        self._accounts = {n: a for n, a in self._accounts.items() if a.live or a.served > floor}
        return self._accounts.setdefault(tenant, Account(tenant, floor))

    def offers(self) -> Iterator[tuple[Account[Item], Item]]:
        """Items in fair order, following the accounts as they are charged meanwhile.

        The caller either takes the offered item out of ``account.waiting`` or leaves it there,
        which passes over this tenant for the rest of the iteration.
        """
        open_accounts = [account for account in self._accounts.values() if account.waiting]
        while open_accounts:
            account = min(open_accounts, key=lambda a: a.served)
            item = account.waiting[0]
            yield account, item
            if not account.waiting or account.waiting[0] is item:
                open_accounts.remove(account)


@dataclass(frozen=True, slots=True)
class Holding(Generic[Item]):
    """Something a tenant holds that could be taken back.

    Attributes:
        weight: How much it holds of what is short: rows, or tokens of memory.
        age: Larger is younger.
    """

    item: Item
    tenant: TenantId
    weight: int
    age: int


def to_take_back(
    holdings: Iterable[Holding[Item]], tenant: TenantId, already: int, need: int
) -> Item | None:
    """What to take from the tenant that holds most, for the sake of ``tenant``.

    Only if the other is left with no less than ``tenant`` will have: so nothing is taken back and
    forth, and equal shares stay as they are.

    Args:
        holdings: Everything that could be taken back.
        tenant: Who is in need.
        already: What ``tenant`` holds of what is short, or has been promised.
        need: How much more it needs.

    Returns:
        The youngest holding of that tenant, or None if nobody holds that much more.
    """
    total: dict[TenantId, int] = {}
    youngest: dict[TenantId, Holding[Item]] = {}
    for holding in holdings:
        if holding.tenant == tenant:
            continue
        total[holding.tenant] = total.get(holding.tenant, 0) + holding.weight
        known = youngest.get(holding.tenant)
        if known is None or holding.age > known.age:
            youngest[holding.tenant] = holding
    if not total:
        return None
    richest = max(total, key=lambda name: total[name])
    victim = youngest[richest]
    return victim.item if total[richest] - victim.weight >= already + need else None
