"""Who waits for whom, counted in steps and tokens of the engine; never in time."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, VOCAB, Driver, batch, expect
from twinkle_dask.types import (
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    StepResult,
)

SPEC = LoraSpec(rank=2, seed=1, train_unembed=False)
STEP = OptimStep(adam=ADAM)
BUDGET = 64


def rows(lengths: Sequence[int], *, backward: bool = True) -> ForwardBackward:
    return batch(np.random.default_rng(0), lengths, backward=backward)


def steps_until(driver: Driver, work_id: str) -> tuple[int, int]:
    """Steps, and tokens of anybody, until this work has ended."""
    before, steps = driver.trainer.tokens_done, 0
    while work_id not in driver.outcomes:
        assert driver.trainer.busy
        driver.take()
        steps += 1
    return steps, driver.trainer.tokens_done - before


def with_runs(driver: Driver, names: Sequence[str]) -> Driver:
    for name in names:
        driver.create(name, SPEC)
    return driver


@pytest.mark.parametrize("steps_before", [0, 1, 2, 7])
def test_a_small_step_beside_a_batch_of_100k_tokens(make: MakeDriver, steps_before: int) -> None:
    """forward_backward is in the very next micro-batch, and optim_step comes right after it."""
    budget = 1024
    driver = with_runs(make(budget), ["huge", "small"])
    huge = driver.submit("huge", rows([512] * 200), tenant="huge")
    for _ in range(steps_before):
        driver.take()
    small = driver.submit("small", rows([32, 32]), tenant="small")
    step = driver.submit("small", STEP, tenant="small")
    steps, tokens = steps_until(driver, small)
    assert steps == 1
    assert tokens <= budget
    steps, tokens = steps_until(driver, step)
    assert steps <= 2
    assert tokens <= budget
    expect(driver.outcomes[small], ForwardBackwardResult)
    assert expect(driver.outcomes[step], StepResult).metrics["grad_norm:mean"] > 0
    assert huge not in driver.outcomes


@pytest.mark.parametrize("small_backward", [True, False])
@pytest.mark.parametrize("huge_backward", [True, False])
def test_forward_and_backward_do_not_hold_up_one_another(
    make: MakeDriver, huge_backward: bool, small_backward: bool
) -> None:
    """They may need passes of their own, so the small one may have to let one go before it."""
    driver = with_runs(make(BUDGET), ["huge", "small"])
    driver.submit("huge", rows([16] * 100, backward=huge_backward), tenant="huge")
    driver.take()
    small = driver.submit("small", rows([16], backward=small_backward), tenant="small")
    _, tokens = steps_until(driver, small)
    assert tokens <= 2 * BUDGET


def test_a_result_comes_as_soon_as_its_rows_are_done(make: MakeDriver) -> None:
    """One work for each micro-batch: one result for each step, in the order of submission."""
    driver = with_runs(make(BUDGET), ["a"])
    ids = [driver.submit("a", rows([BUDGET])) for _ in range(5)]
    for number, work_id in enumerate(ids):
        assert driver.take() == [work_id]
        assert driver.trainer.tokens_done == (number + 1) * BUDGET
    assert not driver.trainer.busy


def test_results_come_in_the_order_of_their_ends(make: MakeDriver) -> None:
    """The shorter of two equally served tenants' works ends first, whenever it was submitted."""
    driver = with_runs(make(BUDGET), "abc")
    lengths = {"a": [16] * 12, "b": [16] * 3, "c": [16] * 6}
    ids = {driver.submit(run, rows(lengths[run]), tenant=run): run for run in "abc"}
    ended: list[str] = []
    while driver.trainer.busy:
        ended += [ids[work_id] for work_id in driver.take()]
    assert ended == ["b", "c", "a"]


@pytest.mark.parametrize("num_tenants", [2, 3, 5])
def test_equal_load_gets_equal_tokens(make: MakeDriver, num_tenants: int) -> None:
    """After every single micro-batch; works of one row, so that results count tokens."""
    names = [f"t{number}" for number in range(num_tenants)]
    driver = with_runs(make(BUDGET), names)
    tenant_of = {
        driver.submit(name, rows([16]), tenant=name): name for name in names for _ in range(12)
    }
    served = Counter(dict.fromkeys(names, 0))
    while driver.trainer.busy:
        served.update(tenant_of[work_id] for work_id in driver.take())
        assert max(served.values()) - min(served.values()) <= 1
    assert set(served.values()) == {12}


def test_runs_do_not_multiply_a_tenants_share(make: MakeDriver) -> None:
    many = [f"many{number}" for number in range(6)]
    driver = with_runs(make(BUDGET), [*many, "one"])
    for name in many:
        for _ in range(8):
            driver.submit(name, rows([16]), tenant="many")
    ids = [driver.submit("one", rows([16]), tenant="one") for _ in range(8)]
    for _ in range(4):
        driver.take()
    assert len(driver.outcomes.keys() & set(ids)) == 8


def test_a_step_does_not_wait_for_the_rows_of_other_runs(make: MakeDriver) -> None:
    """Not even when rows and steps of everybody keep coming."""
    driver = with_runs(make(BUDGET), "abc")
    driver.forward_backward("a", rows([8]))
    for run in "bc":
        driver.submit(run, rows([BUDGET] * 10), tenant=run)
    driver.take()
    step = driver.submit("a", STEP, tenant="a")
    steps, tokens = steps_until(driver, step)
    assert steps <= 2
    assert tokens <= BUDGET
    assert expect(driver.outcomes[step], StepResult).metrics["grad_norm:mean"] > 0


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_nobody_starves(make: MakeDriver, data: st.DataObject) -> None:
    """Whatever the others submit, and however often: of what is done meanwhile, a tenant gets its
    share. Each of n tenants is never behind the least served one by more than a row, and a
    micro-batch may be under way and another one of the other kind be due.
    """
    num_others = data.draw(st.integers(1, 3), "other tenants")
    longest = 40
    lengths = st.lists(st.integers(1, longest), min_size=1, max_size=5)
    names = [f"other{number}" for number in range(num_others)]
    driver = with_runs(make(BUDGET), [*names, "victim"])

    def others_submit() -> None:
        for name in names:
            for _ in range(data.draw(st.integers(0, 3), name)):
                if data.draw(st.booleans()):
                    driver.submit(name, STEP, tenant=name)
                body = rows(data.draw(lengths), backward=data.draw(st.booleans()))
                driver.submit(name, body, tenant=name)

    for _ in range(data.draw(st.integers(0, 4), "steps before")):
        others_submit()
        driver.take()
    body = rows(data.draw(lengths), backward=data.draw(st.booleans()))
    victim = driver.submit("victim", body, tenant="victim")
    before, steps = driver.trainer.tokens_done, 0
    while victim not in driver.outcomes:
        others_submit()
        driver.take()
        steps += 1
        done = driver.trainer.tokens_done - before
        # What others had more of before the victim came is not held against them (a round),
        assert done <= (num_others + 1) * (body.num_tokens + longest) + 2 * BUDGET
        # and between two micro-batches there is at most one step for other kinds of work.
        assert steps <= 2 * (done + 1)
    expect(driver.outcomes[victim], ForwardBackwardResult)


@pytest.mark.parametrize("length", [BUDGET + 1, 5 * BUDGET])
def test_a_row_over_the_budget_goes_alone_and_lets_others_in_between(
    make: MakeDriver, length: int
) -> None:
    driver = with_runs(make(BUDGET), ["long", "small"])
    long = driver.submit("long", rows([length] * 4), tenant="long")
    driver.take()
    assert driver.trainer.tokens_done == length
    small = driver.submit("small", rows([4] * 16), tenant="small")
    _, tokens = steps_until(driver, small)
    assert tokens <= length + BUDGET
    driver.drain()
    result = expect(driver.outcomes[long], ForwardBackwardResult)
    assert result.metrics["tokens:sum"] == 4 * length
    assert all(np.isfinite(lp).all() and lp.shape == (length,) for lp in result.logprobs)
    assert all(np.abs(lp + np.log(VOCAB)).max() < 3 for lp in result.logprobs)
