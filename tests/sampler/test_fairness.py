"""The order in which tenants are admitted, as pure tables."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.sampler.fairness import Account, FairQueue, Holding, to_take_back
from twinkle_dask.types import TenantId

Item = tuple[TenantId, int]  # whose, and what it costs
COSTS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def add(queue: FairQueue[Item], tenant: TenantId, cost: int) -> Account[Item]:
    account = queue.account(tenant)
    account.live += 1
    account.waiting.append((tenant, cost))
    return account


def take(queue: FairQueue[Item]) -> Item:
    account, item = next(queue.offers())
    account.waiting.popleft()
    account.served += item[1]
    account.live -= 1
    return item


@given(costs=st.dictionaries(st.sampled_from("abcd").map(TenantId), COSTS, min_size=2))
def test_tenants_who_always_wait_differ_by_one_item_at_most(
    costs: dict[TenantId, list[int]],
) -> None:
    queue: FairQueue[Item] = FairQueue()
    for tenant, sizes in costs.items():
        for size in sizes:
            add(queue, tenant, size)
    served: Counter[TenantId] = Counter()
    left = {tenant: list(sizes) for tenant, sizes in costs.items()}
    largest = max(max(sizes) for sizes in costs.values())
    while all(left.values()):
        tenant, size = take(queue)
        assert left[tenant].pop(0) == size  # in order of arrival
        served[tenant] += size
        assert max(served[t] for t in costs) - min(served[t] for t in costs) <= largest
    while len(queue):
        take(queue)


@given(backlog=st.integers(1, 200), cost=st.integers(1, 100))
def test_a_newcomer_is_next_but_one(backlog: int, cost: int) -> None:
    """However long the queue of another tenant, and however much it had before."""
    queue: FairQueue[Item] = FairQueue()
    for _ in range(backlog + 3):
        add(queue, TenantId("many"), cost)
    for _ in range(2):
        take(queue)
    add(queue, TenantId("one"), 5)
    assert TenantId("one") in {take(queue)[0], take(queue)[0]}


def test_idleness_earns_nothing_and_past_use_costs_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    a, b = TenantId("a"), TenantId("b")
    for _ in range(5):
        add(queue, a, 100)
        take(queue)
    for _ in range(4):  # nobody was present, so both begin level
        add(queue, a, 10)
        add(queue, b, 10)
    assert Counter(take(queue)[0] for _ in range(4)) == {a: 2, b: 2}


def test_leaving_does_not_wipe_a_debt() -> None:
    queue: FairQueue[Item] = FairQueue()
    a, b = TenantId("a"), TenantId("b")
    for _ in range(4):
        add(queue, b, 10)
    add(queue, a, 1000)
    assert {take(queue)[0], take(queue)[0]} == {a, b}
    assert queue.account(a).live == 0
    add(queue, a, 10)
    assert [take(queue)[0] for _ in range(4)] == [b, b, b, a]


def test_what_is_left_in_place_passes_over_its_tenant_only() -> None:
    queue: FairQueue[Item] = FairQueue()
    for tenant in "aab":
        add(queue, TenantId(tenant), 1)
    assert [item[0] for _, item in queue.offers()] == ["a", "b"]
    assert len(queue) == 3


HOLDINGS = st.lists(
    st.tuples(st.sampled_from("abc").map(TenantId), st.integers(1, 9)), max_size=30
).map(lambda pairs: [Holding(i, t, w, age=i) for i, (t, w) in enumerate(pairs)])


@given(holdings=HOLDINGS, need=st.integers(1, 5))
def test_taking_back_evens_out_and_then_stops(holdings: list[Holding[int]], need: int) -> None:
    """Whoever is taken from keeps at least as much as the other gets, so it ends."""
    poor = TenantId("a")
    for _ in range(100):
        mine = sum(h.weight for h in holdings if h.tenant == poor)
        item = to_take_back(holdings, poor, mine, need)
        if item is None:
            break
        victim = next(h for h in holdings if h.item == item)
        assert victim.tenant != poor
        assert victim.age == max(h.age for h in holdings if h.tenant == victim.tenant)
        holdings.remove(victim)
        rest = sum(h.weight for h in holdings if h.tenant == victim.tenant)
        assert rest >= mine + need
        holdings.append(Holding(1000 + item, poor, need, age=1000 + item))
        back = to_take_back(holdings, victim.tenant, rest, victim.weight)
        assert back is None or holdings[-1].item != back
    else:
        raise AssertionError("taking back does not end")
