"""What a run is asked to do, as data: told among others, told alone, and compared."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from tests.trainer.driver import Driver
from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.trainer.work import CreateRun, LoadState, Outcome
from twinkle_dask.types import (
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    RunState,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class Save:
    """Export everything."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load what the newest ``Save`` of this run exported, which may not be there yet."""

    with_optimizer: bool


Act: TypeAlias = ForwardBackward | OptimStep | Save | Load


@dataclass(frozen=True, slots=True)
class Story:
    """A run from its creation on; the first act is a ``Save``, so that a ``Load`` has a state."""

    spec: LoraSpec
    tenant: str
    acts: tuple[Act, ...]


class Teller:
    """Submits a story act by act."""

    def __init__(self, driver: Driver, run: str, story: Story) -> None:
        self.ids = [driver.submit(run, CreateRun(spec=story.spec), story.tenant)]
        self._driver = driver
        self._run = run
        self._story = story
        self._saved: Future[RunState] = Future()
        self._left = iter((Save(), *story.acts))
        self.go_on()

    def go_on(self) -> bool:
        """Submit the next act; False if there is none."""
        act = next(self._left, None)
        if act is None:
            return False
        run, tenant = self._run, self._story.tenant
        if isinstance(act, Save):
            work_id, self._saved = self._driver.save(run, tenant)
        elif isinstance(act, Load):
            body = LoadState(state=self._saved, with_optimizer=act.with_optimizer)
            work_id = self._driver.submit(run, body, tenant)
        else:
            work_id = self._driver.submit(run, act, tenant)
        self.ids.append(work_id)
        return True

    def outcomes(self) -> list[Outcome]:
        """What came out, in the order of the acts; everything must have ended."""
        return [self._driver.outcomes[work_id] for work_id in self.ids]


def alone(driver: Driver, story: Story) -> list[Outcome]:
    """The story with nobody else about, each act after the one before has ended."""
    teller = Teller(driver, "alone", story)
    driver.drain()
    while teller.go_on():
        driver.drain()
    return teller.outcomes()


Check: TypeAlias = Callable[[Any, Any], None]


def compare(actual: Outcome, expected: Outcome, check: Check) -> None:
    """Outcomes of the same kind and shape, their numbers by ``check``."""
    if isinstance(expected, TwinkleDaskError):
        assert type(actual) is type(expected)
    elif isinstance(expected, ForwardBackwardResult):
        assert isinstance(actual, ForwardBackwardResult)
        for ours, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
            assert ours.shape == theirs.shape
            check(ours, theirs)
        _compare_metrics(actual.metrics, expected.metrics, check)
    elif isinstance(expected, StepResult):
        assert isinstance(actual, StepResult)
        _compare_metrics(actual.metrics, expected.metrics, check)
    elif isinstance(expected, RunState):
        assert isinstance(actual, RunState)
        compare_states(actual, expected, check)
    else:
        assert actual is None


def compare_states(actual: RunState, expected: RunState, check: Check) -> None:
    """Weights, moments and gradients, each as one long vector."""
    assert actual.adapter.spec == expected.adapter.spec
    _compare_vectors(actual.adapter.weights, expected.adapter.weights, check)
    assert (actual.optimizer is None) == (expected.optimizer is None)
    if actual.optimizer is not None and expected.optimizer is not None:
        assert actual.optimizer.step == expected.optimizer.step
        _compare_vectors(actual.optimizer.exp_avg, expected.optimizer.exp_avg, check)
        _compare_vectors(actual.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq, check)
    assert (actual.gradients is None) == (expected.gradients is None)
    _compare_vectors(actual.gradients or {}, expected.gradients or {}, check)


def _compare_vectors(
    actual: Mapping[str, Float32Array], expected: Mapping[str, Float32Array], check: Check
) -> None:
    assert actual.keys() == expected.keys()
    if expected:
        check(*(np.concatenate([m[name].ravel() for name in expected]) for m in (actual, expected)))


def _compare_metrics(
    actual: Mapping[str, float], expected: Mapping[str, float], check: Check
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        check(np.float64(actual[name]), np.float64(value))


def exactly(actual: Any, expected: Any) -> None:
    """Bit for bit; NaN equals NaN."""
    np.testing.assert_array_equal(actual, expected)


def moved_state(driver: Driver, spec: LoraSpec, rng: np.random.Generator) -> RunState:
    """A state of this shape as if it had been trained: B is no longer zero.

    Found by making a run and dropping it again.
    """
    driver.create("scratch", spec)
    state = driver.state("scratch")
    driver.trainer.drop_run(next(run for run in driver.trainer.runs() if run == "scratch"))
    weights = {
        name: value if ".lora_A." in name else rng.normal(0, 0.05, value.shape).astype(np.float32)
        for name, value in state.adapter.weights.items()
    }
    return replace(state, adapter=replace(state.adapter, weights=weights))
