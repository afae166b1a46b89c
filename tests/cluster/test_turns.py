"""Whose turn it is: bounds, order, nobody starves, and one who must be alone is."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.cluster.turns import Turns
from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.types import TenantId

A, B = TenantId("a"), TenantId("b")

tasks = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=30)


@given(tasks, st.integers(1, 4), st.integers(1, 3))
def test_bounds_hold_and_everybody_comes_in_order(
    given_tasks: list[tuple[str, bool, bool]], places: int, per_tenant: int
) -> None:
    """Some give up while they wait or while they work; nobody else is held up by that."""
    started: dict[str, list[int]] = {name: [] for name in "abc"}
    inside: Counter[str] = Counter()

    async def work(turns: Turns, name: str, number: int, alone: bool) -> None:
        async with turns.turn(TenantId(name), alone=alone):
            if not alone:
                started[name].append(number)
            inside["alone" if alone else name] += 1
            for _ in range(number % 3 + 1):
                assert inside.total() == 1 if inside["alone"] else inside.total() <= places
                assert all(inside[name] <= per_tenant for name in "abc")
                await asyncio.sleep(0)
            inside["alone" if alone else name] -= 1

    async def scenario() -> None:
        turns = Turns(per_tenant=per_tenant, max_waiting=100)
        turns.places = places
        working: list[tuple[asyncio.Task[None], bool]] = []
        for number, (name, alone, leaves) in enumerate(given_tasks):
            working.append((asyncio.create_task(work(turns, name, number, alone)), leaves))
        await asyncio.sleep(0)
        for task, leaves in working:
            if leaves and inside.total() == 0:
                task.cancel()
        await asyncio.gather(*(task for task, _ in working), return_exceptions=True)
        for task, leaves in working:
            assert leaves or task.exception() is None

    asyncio.run(scenario())
    assert all(numbers == sorted(numbers) for numbers in started.values())


async def test_a_tenant_with_many_tasks_does_not_hold_up_another() -> None:
    turns = Turns(per_tenant=2, max_waiting=10)
    order: list[str] = []

    async def work(tenant: TenantId) -> None:
        async with turns.turn(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(tenant) for tenant in (A, A, A, A, B, B)))
    assert order == [A, B, A, B, A, A]


async def test_one_who_gives_up_leaves_no_gap() -> None:
    turns = Turns(per_tenant=2, max_waiting=10)
    async with AsyncExitStack() as held:
        await held.enter_async_context(turns.turn(A))
        waiting = asyncio.ensure_future(turns.turn(B).__aenter__())
        alone = asyncio.ensure_future(turns.turn(A, alone=True).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        alone.cancel()
        await asyncio.gather(waiting, alone, return_exceptions=True)
    async with asyncio.timeout(5), turns.turn(B):
        pass


async def test_too_many_waiting_tasks_of_one_tenant_are_refused() -> None:
    turns = Turns(per_tenant=1, max_waiting=1)
    async with turns.turn(A):
        waiting = asyncio.ensure_future(turns.turn(A).__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(QuotaExceeded, match="1 tasks of yours wait"):
            await turns.turn(A).__aenter__()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
