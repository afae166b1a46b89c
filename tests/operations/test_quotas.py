"""What a tenant may hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.operations.quotas import Quota, Quotas
from twinkle_dask.types import TenantId

ME, OTHER = TenantId("me"), TenantId("other")


@given(st.lists(st.tuples(st.sampled_from([ME, OTHER]), st.integers(1, 5), st.booleans())))
def test_no_tenant_holds_more_than_the_limit_or_less_than_nothing(
    story: list[tuple[TenantId, int, bool]],
) -> None:
    quota = Quota(6, "things")
    held = {ME: 0, OTHER: 0}
    for tenant, amount, add in story:
        if not add:
            amount = min(amount, held[tenant])
            quota.remove(tenant, amount)
            held[tenant] -= amount
        elif held[tenant] + amount <= 6:
            quota.add(tenant, amount)
            held[tenant] += amount
        else:
            with pytest.raises(QuotaExceeded, match="6 are the limit"):
                quota.add(tenant, amount)
        assert {t: quota.held(t) for t in held} == held


def test_something_larger_than_the_limit_goes_alone() -> None:
    quota = Quota(10, "bytes")
    with quota.holding(ME, 15):
        with pytest.raises(QuotaExceeded, match="15 bytes") as refused:
            quota.add(ME)
        assert refused.value.retry_after_s == 1.0
        quota.add(OTHER)
    assert quota.held(ME) == 0


def test_what_was_there_before_a_restart_is_counted_whatever_the_limit() -> None:
    quota = Quota(1, "runs")
    for _ in range(3):
        quota.restore(ME)
    with pytest.raises(QuotaExceeded):
        quota.add(ME)
    quota.remove(ME, 3)
    quota.add(ME)


def test_to_give_back_too_much_is_a_fault_of_ours() -> None:
    quota = Quota(1, "runs")
    quota.add(ME)
    with pytest.raises(ValueError, match="not 2"):
        quota.remove(ME, 2)
    assert quota.held(ME) == 1


def test_a_failure_in_the_block_gives_back_too() -> None:
    quota = Quota(1, "runs")
    with pytest.raises(KeyError), quota.holding(ME):
        raise KeyError
    quota.add(ME)


def test_the_limits_are_the_configured_ones() -> None:
    quotas = Quotas.of(LimitConfig(max_runs=1, max_samples_in_flight=2, max_queued_bytes=3))
    for quota, limit in ((quotas.runs, 1), (quotas.samples, 2), (quotas.queued_bytes, 3)):
        for _ in range(limit):
            quota.add(ME)
        with pytest.raises(QuotaExceeded):
            quota.add(ME)
