"""Batches at the edges of what is allowed, against the same data one row at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import dense
from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import Driver, batch
from tests.trainer.stories import compare_states, exactly, moved_state
from tests.trainer.test_numerics import near
from twinkle_dask.losses import LOSSES
from twinkle_dask.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    LossName,
    OptimStep,
    RunState,
    StepResult,
)

SPEC = LoraSpec(rank=4, seed=1)
WEIGHTED = [name for name, terms in LOSSES.items() if "weights" in terms.optional]


@pytest.fixture
def start(make: MakeDriver) -> RunState:
    return moved_state(make(), SPEC, np.random.default_rng(9))


def of(body: ForwardBackward, data: Sequence[Datum]) -> ForwardBackward:
    return replace(body, data=tuple(data))


def result_and_state(
    driver: Driver, start: RunState, body: ForwardBackward
) -> tuple[ForwardBackwardResult, RunState]:
    driver.load("r", start)
    return driver.forward_backward("r", body), driver.state("r")


def near_logprobs(result: ForwardBackwardResult, expected: Sequence[Float32Array]) -> None:
    """Up to the rounding of two layers of sums over 64 to 192 terms of order 1."""
    for ours, theirs in zip(result.logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def near_dense(
    folder: Path,
    start: RunState,
    body: ForwardBackward,
    result: ForwardBackwardResult,
    state: RunState,
) -> None:
    reference = dense.DenseRun(dense.load(folder), start.adapter)
    logprobs, total = reference.forward_backward(body)
    near_logprobs(result, [lp.numpy() for lp in logprobs])
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4, abs=1e-3)
    assert state.gradients is not None
    # As one vector: a row of one token has nothing to attend to but itself, so that in exact
    # arithmetic the gradients of queries and keys are 0, and here they are pure rounding.
    near(
        np.concatenate([state.gradients[name].ravel() for name in reference.weights]),
        torch.cat(
            [g.flatten() for leaf in reference.weights.values() if (g := leaf.grad) is not None]
        ),
    )


@pytest.mark.parametrize("budget", [1, 16, 10_000])
@pytest.mark.parametrize(
    ("lengths", "targets"),
    [
        ([1], None),
        ([1] * 20, None),
        ([1, 40, 1, 1, 17], None),
        ([300, 1, 5], None),
        ([1, 1, 9], 1),
        ([30, 2, 9, 9], 5),
    ],
    ids=["one token", "tokens", "tokens among rows", "a row over the budget", "(N, 1)", "(N, 5)"],
)
def test_lengths_and_targets(
    make: MakeDriver,
    folder: Path,
    start: RunState,
    budget: int,
    lengths: list[int],
    targets: int | None,
) -> None:
    body = batch(np.random.default_rng(0), lengths, targets=targets)
    for datum in body.data:
        datum.loss_inputs["weights"][-1] = 1.5  # so that a row of one token counts
    near_dense(folder, start, body, *result_and_state(make(budget), start, body))


def test_one_target_each_is_n_by_1(make: MakeDriver, start: RunState) -> None:
    """Only the shape of the answer differs."""
    body = batch(np.random.default_rng(0), (20, 7))
    data = [
        replace(
            d,
            target_tokens=d.target_tokens[:, None],
            loss_inputs={name: array[:, None] for name, array in d.loss_inputs.items()},
        )
        for d in body.data
    ]
    flat, flat_state = result_and_state(make(), start, body)
    tall, tall_state = result_and_state(make(), start, of(body, data))
    for a, b in zip(flat.logprobs, tall.logprobs, strict=True):
        assert b.shape == (len(a), 1)
        exactly(b[:, 0], a)
    assert flat.metrics == pytest.approx(dict(tall.metrics))
    assert flat_state.gradients is not None
    assert tall_state.gradients is not None
    for name, gradient in flat_state.gradients.items():
        near(tall_state.gradients[name], gradient, rel=1e-5)


@pytest.mark.parametrize("loss", WEIGHTED)
@pytest.mark.parametrize("backward", [True, False])
def test_zero_weights_everywhere(
    make: MakeDriver, start: RunState, loss: LossName, backward: bool
) -> None:
    """Logprobs are there all the same; loss and gradient are exactly 0, and a step may spend it."""
    body = batch(np.random.default_rng(0), (20, 7), loss, backward=backward)
    data = [
        replace(
            d, loss_inputs={**d.loss_inputs, "weights": np.zeros_like(d.loss_inputs["weights"])}
        )
        for d in body.data
    ]
    driver = make()
    weighted, _ = result_and_state(driver, start, body)
    result, state = result_and_state(driver, start, of(body, data))
    near_logprobs(result, weighted.logprobs)
    assert result.metrics["loss:sum"] == 0
    if not backward:
        assert state.gradients is None
        return
    assert state.gradients is not None
    assert not any(gradient.any() for gradient in state.gradients.values())
    outcome = driver.do("r", OptimStep(adam=AdamParams(weight_decay=0.0)))
    assert isinstance(outcome, StepResult)
    assert outcome.metrics["grad_norm:mean"] == 0
    for name, weight in driver.state("r").adapter.weights.items():
        exactly(weight, start.adapter.weights[name])


def test_a_row_of_zero_weights_changes_nothing_for_the_others(
    make: MakeDriver, start: RunState
) -> None:
    body = batch(np.random.default_rng(0), (20, 7, 31))
    first = body.data[0]
    none = replace(first, loss_inputs={"weights": np.zeros_like(first.loss_inputs["weights"])})
    result, state = result_and_state(make(), start, of(body, [none, *body.data[1:]]))
    fewer, expected = result_and_state(make(), start, of(body, body.data[1:]))
    near_logprobs(of_result(result, 1), fewer.logprobs)
    assert result.metrics["loss:sum"] == pytest.approx(fewer.metrics["loss:sum"], rel=1e-5)
    assert state.gradients is not None
    assert expected.gradients is not None
    for name, gradient in expected.gradients.items():
        near(state.gradients[name], gradient, rel=1e-5)


def of_result(result: ForwardBackwardResult, start: int) -> ForwardBackwardResult:
    return replace(result, logprobs=result.logprobs[start:])


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("budget", [16, 10_000])
def test_the_same_datum_many_times(
    make: MakeDriver, start: RunState, loss: LossName, budget: int
) -> None:
    """Even the same object; each copy adds the same."""
    body = batch(np.random.default_rng(0), (21,), loss)
    single, once = result_and_state(make(budget), start, body)
    result, state = result_and_state(make(budget), start, of(body, body.data * 5))
    near_logprobs(result, single.logprobs * 5)
    total = 5 * single.metrics["loss:sum"]
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert result.metrics["tokens:sum"] == 5 * 21
    assert state.gradients is not None
    assert once.gradients is not None
    for name, gradient in once.gradients.items():
        near(state.gradients[name], 5 * gradient, rel=1e-5)


def test_the_same_batch_in_two_runs_of_one_state(make: MakeDriver, start: RunState) -> None:
    """Twins in one pass stay twins, bit for bit: nothing but their places differs."""
    driver = make(10_000)
    body = batch(np.random.default_rng(0), (24, 24))
    for run in "ab":
        driver.load(run, start)
    for _ in range(3):
        for run in "ab":
            driver.submit(run, body, tenant=run)
            driver.submit(run, OptimStep(adam=AdamParams(learning_rate=1e-2)), tenant=run)
        driver.drain()
    compare_states(driver.state("a"), driver.state("b"), exactly)
