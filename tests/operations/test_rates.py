import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.operations.rates import Rates
from twinkle_dask.types import TenantId

A, B = TenantId("a"), TenantId("b")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def rates(clock: Clock, *, operations: float | None = None, tokens: float | None = None) -> Rates:
    return Rates(operations_per_s=operations, tokens_per_s=tokens, window_s=2.0, clock=clock)


def test_operations_are_counted_by_tenant_and_come_back() -> None:
    clock = Clock()
    some = rates(clock, operations=1.5)
    for _ in range(3):
        some.admit(A, 0)
    with pytest.raises(QuotaExceeded, match=r"3 operations in 2 s") as caught:
        some.admit(A, 0)
    assert caught.value.retry_after_s == 2.0
    some.admit(B, 0)
    clock.now_s += 2.0
    some.admit(A, 0)


def test_a_large_batch_is_admitted_alone() -> None:
    clock = Clock()
    some = rates(clock, tokens=5)
    some.admit(A, 1000)
    with pytest.raises(QuotaExceeded, match="10 input tokens"):
        some.admit(A, 1)
    clock.now_s += 2.0
    some.admit(A, 4)
    some.admit(A, 6)
    with pytest.raises(QuotaExceeded):
        some.admit(A, 1)


def test_without_limits_nothing_is_kept() -> None:
    some = rates(Clock())
    for _ in range(10):
        some.admit(A, 10**9)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 20)), max_size=60))
def test_no_window_ever_holds_more_than_the_limit(sent: list[tuple[float, int]]) -> None:
    clock = Clock()
    some = rates(clock, operations=2, tokens=10)
    admitted: list[tuple[float, int]] = []
    waits_s: list[float] = []
    for pause_s, tokens in sent:
        clock.now_s += pause_s
        try:
            some.admit(A, tokens)
        except QuotaExceeded as error:
            waits_s.append(error.retry_after_s)
            continue
        admitted.append((clock.now_s, tokens))
        window = [one for at, one in admitted if at > clock.now_s - 2.0]
        assert len(window) <= 4
        assert sum(window) <= 20 or sum(window[:-1]) == 0
    assert all(0 <= wait_s <= 2.0 for wait_s in waits_s)
