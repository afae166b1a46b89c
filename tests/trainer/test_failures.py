"""A run that breaks its pass breaks it for nobody else, and can go on afterwards.

What the others get is compared bit for bit with what they get when the broken run is not there;
``test_sharing`` says why that can be asked of float32 on one thread.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch, expect
from tests.trainer.stories import compare, compare_states, exactly, moved_state
from tests.trainer.test_sharing import ONE_PASS
from twinkle_dask.errors import InvalidRequest, ServiceFault, TwinkleDaskError
from twinkle_dask.trainer.work import Outcome
from twinkle_dask.types import (
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    RunState,
    StepResult,
)

BAD_RANK = 13  # no other size in these tests, so that an operation on the bad adapter shows
_SIZES = {BAD_RANK, 2 * BAD_RANK, 3 * BAD_RANK}  # also of two or three matrices side by side
SPECS = {
    "a": LoraSpec(rank=4, seed=1),
    "b": LoraSpec(rank=8, seed=2, train_unembed=False),
    "bad": LoraSpec(rank=BAD_RANK, seed=3),
    "c": LoraSpec(rank=16, seed=4, train_attn=False),
    "d": LoraSpec(rank=1, seed=5, train_mlp=False),
}
OTHERS = [run for run in SPECS if run != "bad"]


def bodies(rng: np.random.Generator) -> dict[str, ForwardBackward]:
    """A batch for each run; the last of them only evaluates it."""
    # No loss that clips, so that how many positions count is fixed.
    losses = {"b": "importance_sampling"}
    given = {run: batch(rng, (19, 5, 30), losses.get(run, "cross_entropy")) for run in SPECS}
    return given | {"d": replace(given["d"], backward=False)}


def starts(make: MakeDriver) -> dict[str, RunState]:
    rng = np.random.default_rng(1)
    return {run: moved_state(make(), spec, rng) for run, spec in SPECS.items()}


def driver_with(make: MakeDriver, states: dict[str, RunState]) -> Driver:
    """Every run with its state, and a gradient under way."""
    driver = make(10**6, **ONE_PASS)
    for run, state in states.items():
        driver.load(run, state)
    for run, body in bodies(np.random.default_rng(2)).items():
        if run in states and body.backward and run != "bad":
            driver.forward_backward(run, body)
    return driver


def without(states: dict[str, RunState]) -> dict[str, RunState]:
    return {run: state for run, state in states.items() if run != "bad"}


def with_inputs(body: ForwardBackward, name: str, value: float) -> ForwardBackward:
    """One value of the last datum replaced."""
    *others, last = body.data
    inputs = {key: array.copy() for key, array in last.loss_inputs.items()}
    inputs[name][-1] = value
    return replace(body, data=(*others, replace(last, loss_inputs=inputs)))


def with_weights(state: RunState, change: Callable[[Float32Array], None]) -> RunState:
    weights = {name: array.copy() for name, array in state.adapter.weights.items()}
    for array in weights.values():
        change(array)
    return replace(state, adapter=replace(state.adapter, weights=weights))


def submit_all(driver: Driver, given: dict[str, ForwardBackward]) -> dict[str, Outcome]:
    ids = {run: driver.submit(run, body, tenant=run) for run, body in given.items()}
    outcomes = driver.drain()
    return {run: outcomes[work_id] for run, work_id in ids.items()}


def rounded(actual: Float32Array, expected: Float32Array) -> None:
    """The same sums in another order: some units in the last place of logprobs of order 6, and
    metrics that are means of those.
    """
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def others_are_untouched(
    make: MakeDriver,
    driver: Driver,
    states: dict[str, RunState],
    outcomes: dict[str, Outcome],
    *,
    retried: bool = False,
) -> None:
    """Their results, and their states after a step each, are those of a world without the bad.

    Bit for bit, but for what "d" got by a second try: beside learners it was computed by the
    products that record for backward, and alone, since it only evaluates, by those that do not.
    """
    world = driver_with(make, without(states))
    given = bodies(np.random.default_rng(0))
    expected = submit_all(world, {run: given[run] for run in OTHERS})
    for run in OTHERS:
        expect(expected[run], ForwardBackwardResult)
        compare(outcomes[run], expected[run], rounded if retried and run == "d" else exactly)
        compare_states(driver.state(run), world.state(run), exactly)
        compare(driver.do(run, STEP), world.do(run, STEP), exactly)
        compare_states(driver.state(run), world.state(run), exactly)


STEP = OptimStep(adam=ADAM)


def goes_on(make: MakeDriver, driver: Driver, state: RunState) -> None:
    """A batch and a step give the bad run what they give to one that never failed."""
    good = bodies(np.random.default_rng(0))["bad"]
    control = make(10**6, **ONE_PASS)
    control.load("bad", state)
    for each in (driver, control):
        each.forward_backward("bad", good)
        expect(each.do("bad", STEP), StepResult)
    compare_states(driver.state("bad"), control.state("bad"), exactly)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        ("cross_entropy", "weights", float("nan")),
        ("cross_entropy", "weights", float("-inf")),
        pytest.param("cross_entropy", "weights", 2e37, id="only the gradient overflows"),
        ("importance_sampling", "logprobs", -1e4),
        ("importance_sampling", "advantages", float("inf")),
        ("ppo", "logprobs", float("nan")),
    ],
)
def test_extreme_inputs(make: MakeDriver, place: int, loss: str, name: str, value: float) -> None:
    states = starts(make)
    driver = driver_with(make, states)
    before = driver.state("bad")
    given = bodies(np.random.default_rng(0))
    bad = batch(np.random.default_rng(3), [24, 24], loss)
    order = [*OTHERS[:place], "bad", *OTHERS[place:]]
    given["bad"] = with_inputs(with_inputs(bad, "weights", 1.0), name, value)
    outcomes = submit_all(driver, {run: given[run] for run in order})
    assert isinstance(outcomes["bad"], InvalidRequest)
    compare_states(driver.state("bad"), before, exactly)
    others_are_untouched(make, driver, states, outcomes)
    goes_on(make, driver, states["bad"])


def all_infinite(array: Float32Array) -> None:
    array[:] = np.inf


def one_nan(array: Float32Array) -> None:
    array[0, -1] = np.nan


def too_large(array: Float32Array) -> None:
    array *= 1e30


@pytest.mark.parametrize("change", [all_infinite, one_nan, too_large])
@pytest.mark.parametrize("backward", [True, False])
def test_weights_that_overflow(
    make: MakeDriver, change: Callable[[Float32Array], None], backward: bool
) -> None:
    """As a diverged run has them, or a state that was loaded."""
    states = starts(make)
    broken = {**states, "bad": with_weights(states["bad"], change)}
    driver = driver_with(make, broken)
    before = driver.state("bad")
    given = bodies(np.random.default_rng(0))
    given["bad"] = replace(given["bad"], backward=backward)
    outcomes = submit_all(driver, given)
    assert isinstance(outcomes["bad"], InvalidRequest)
    compare_states(driver.state("bad"), before, exactly)
    others_are_untouched(make, driver, states, outcomes)
    driver.load("bad", states["bad"])
    goes_on(make, driver, states["bad"])


class OutOfMemory(TorchDispatchMode):
    """Below autograd: the ``first``-th operation on the bad run's adapter fails, as do all later.

    With ``once`` the later ones succeed, as when somebody else had the memory for a moment.
    """

    def __init__(self, first: int, *, once: bool = False) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
        self.seen = 0
        self._first = first
        self._once = once

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(t.dim() > 1 and not _SIZES.isdisjoint(t.shape) for t in tensors):
            self.seen += 1
            if self.seen == self._first or (self.seen > self._first and not self._once):
                raise torch.OutOfMemoryError("made by the test")
        return func(*args, **(kwargs or {}))


def operations_of_the_bad(make: MakeDriver, states: dict[str, RunState]) -> int:
    """How many there are in a pass with everybody; none of them without it."""
    given = bodies(np.random.default_rng(0))
    counts: list[int] = []
    for some in (states, without(states)):
        driver = driver_with(make, some)
        with OutOfMemory(10**9) as counting:
            submit_all(driver, {run: given[run] for run in some})
        counts.append(counting.seen)
    assert counts[0] > 0
    assert counts[1] == 0
    return counts[0]


@settings(deadline=None, max_examples=15)
@given(where=st.floats(0, 1), once=st.booleans())
def test_memory_runs_out_at_any_moment(make: MakeDriver, where: float, once: bool) -> None:
    """Forward, in the head, or when half of everybody's gradients are there already."""
    states = starts(make)
    first = 1 + round(where * (operations_of_the_bad(make, states) - 1))
    driver = driver_with(make, states)
    before = driver.state("bad")
    with OutOfMemory(first, once=once) as memory:
        outcomes = submit_all(driver, bodies(np.random.default_rng(0)))
    assert memory.seen >= first
    if isinstance(outcomes["bad"], TwinkleDaskError):
        assert isinstance(outcomes["bad"], ServiceFault)
        assert "memory" in outcomes["bad"].message
        compare_states(driver.state("bad"), before, exactly)
        others_are_untouched(make, driver, states, outcomes, retried=True)
        goes_on(make, driver, states["bad"])
    else:
        # It was tried again when there was memory: as if nothing had happened.
        assert once
        others_are_untouched(make, driver, states, outcomes, retried=True)
        expect(driver.do("bad", STEP), StepResult)
        control = make(10**6, **ONE_PASS)
        control.load("bad", states["bad"])
        control.forward_backward("bad", bodies(np.random.default_rng(0))["bad"])
        control.do("bad", STEP)
        compare_states(driver.state("bad"), control.state("bad"), exactly)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("num_bad", [1, 3])
def test_several_broken_runs_among_many_works(
    make: MakeDriver, num_bad: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small micro-batches, several works each: what is marked fails, everything else succeeds."""
    mark = 511
    real: Callable[..., torch.Tensor] = torch.nn.functional.embedding

    def embedding(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if bool((tokens == mark).any()):
            raise torch.OutOfMemoryError("made by the test")
        return real(tokens, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
    driver = make(64, lanes=lanes)
    rng = np.random.default_rng(4)
    for run, spec in SPECS.items():
        driver.create(run, spec)
    ids: dict[str, list[str]] = {"good": [], "bad": []}
    for number in range(4):
        for place, run in enumerate(SPECS):
            body = batch(rng, (9, 30, 21))
            tokens = [np.minimum(datum.tokens, mark - 1) for datum in body.data]
            is_bad = place < num_bad and number == 1 + place
            tokens[number % 3][0] = mark if is_bad else 0
            data = [replace(d, tokens=t) for d, t in zip(body.data, tokens, strict=True)]
            which = "bad" if is_bad else "good"
            ids[which].append(driver.submit(run, replace(body, data=tuple(data)), tenant=run))
    outcomes = driver.drain()
    for work_id in ids["good"]:
        expect(outcomes[work_id], ForwardBackwardResult)
    assert len(ids["bad"]) == num_bad
    for work_id in ids["bad"]:
        assert isinstance(outcomes[work_id], ServiceFault)
    for run in SPECS:
        expect(driver.do(run, STEP), StepResult)
