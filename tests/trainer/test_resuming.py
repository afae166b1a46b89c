"""Twenty steps through the engine: AdamW is torch's, and stopping on the way does not show."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch
from tests.trainer.stories import compare_states, exactly
from tests.trainer.test_numerics import near
from twinkle_dask.types import AdamParams, LoraSpec, RunState

SPEC = LoraSpec(rank=4, seed=1)
STEPS = 20


def settings_of(step: int) -> AdamParams:
    """A schedule; every fifth step clips, every third decays."""
    return replace(
        ADAM,
        learning_rate=1e-2 / (1 + step),
        beta2=0.95 if step < 10 else 0.99,
        grad_clip_norm=0.5 if step % 5 == 0 else 0.0,
        weight_decay=0.1 if step % 3 == 0 else 0.0,
    )


def train(driver: Driver, step: int) -> None:
    """One of the twenty steps, from two batches."""
    for part in range(2):
        driver.forward_backward("r", batch(np.random.default_rng([step, part]), (9, 4)))
    driver.step("r", settings_of(step))


def straight(make: MakeDriver) -> RunState:
    driver = make()
    driver.create("r", SPEC)
    for step in range(STEPS):
        train(driver, step)
    return driver.state("r")


@pytest.fixture(scope="module")
def never_stopped(make: MakeDriver) -> RunState:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the function-scoped fixture that does so comes later
    try:
        return straight(make)
    finally:
        torch.set_num_threads(before)


def test_adamw_is_torchs(make: MakeDriver, never_stopped: RunState) -> None:
    """torch.optim.AdamW on the gradients that the engine exports before each step."""
    driver = make()
    driver.create("r", SPEC)
    weights = driver.state("r").adapter.weights
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    optimizer: Any = torch.optim.AdamW(list(leaves.values()), foreach=False, fused=False)
    for step in range(STEPS):
        for part in range(2):
            driver.forward_backward("r", batch(np.random.default_rng([step, part]), (9, 4)))
        for name, gradient in driver.gradients("r").items():
            leaves[name].grad = torch.tensor(gradient)
        adam = settings_of(step)
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), adam.grad_clip_norm)
        optimizer.param_groups[0].update(
            lr=adam.learning_rate,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )
        optimizer.step()
        driver.step("r", adam)
    state = driver.state("r")
    compare_states(state, never_stopped, exactly)  # looking at the gradient changed nothing
    assert state.optimizer is not None
    assert state.optimizer.step == STEPS
    for name, leaf in leaves.items():
        # A few units in the last place for each step: torch's own kernels differ by as much.
        near(state.adapter.weights[name], leaf.detach(), rel=1e-5)
        near(state.optimizer.exp_avg[name], optimizer.state[leaf]["exp_avg"], rel=1e-5)
        near(state.optimizer.exp_avg_sq[name], optimizer.state[leaf]["exp_avg_sq"], rel=1e-5)


@settings(deadline=None, max_examples=8)
@given(
    stops=st.dictionaries(st.integers(0, STEPS - 1), st.booleans(), min_size=1, max_size=4),
    others=st.integers(0, 2),
)
def test_stopping_does_not_show(
    make: MakeDriver, never_stopped: RunState, stops: dict[int, bool], others: int
) -> None:
    """Bit for bit, at any steps, between two batches of a step (True) or between two steps.

    Each time the run moves to a new trainer, where other runs are already.
    """
    driver = make()
    driver.create("r", SPEC)

    def move(driver: Driver) -> Driver:
        state = driver.state("r")
        new = make()
        for other in range(others):
            new.create(f"other{other}", replace(SPEC, seed=other + 7))
            new.forward_backward(f"other{other}", batch(np.random.default_rng(other)))
        new.load("r", state)
        return new

    for step in range(STEPS):
        for part in range(2):
            driver.forward_backward("r", batch(np.random.default_rng([step, part]), (9, 4)))
            if stops.get(step) is (part == 0):
                driver = move(driver)
        driver.step("r", settings_of(step))
    compare_states(driver.state("r"), never_stopped, exactly)
