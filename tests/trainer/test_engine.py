"""What fails, fails alone; what waits, waits for the right thing."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch, expect
from tests.trainer.test_numerics import near, same
from twinkle_dask.errors import (
    CheckpointCorrupt,
    InvalidRequest,
    NotFound,
    ServiceFault,
    TwinkleDaskError,
)
from twinkle_dask.trainer import engine
from twinkle_dask.trainer.batch import Part, length_groups
from twinkle_dask.trainer.work import CreateRun, ExportState, LoadState, WorkBody
from twinkle_dask.types import (
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    RunId,
    RunState,
    StepResult,
)

SPEC = LoraSpec(rank=4, seed=1)
MARK = 13  # first token of a row that breaks its pass


def with_first_token(body: ForwardBackward, token: int) -> ForwardBackward:
    first = replace(body.data[0], tokens=np.full_like(body.data[0].tokens, token))
    return replace(body, data=(first, *body.data[1:]))


def with_input(body: ForwardBackward, name: str, value: float) -> ForwardBackward:
    first = body.data[0]
    inputs = {**first.loss_inputs, name: np.full_like(first.loss_inputs[name], value)}
    return replace(body, data=(replace(first, loss_inputs=inputs), *body.data[1:]))


def three_runs(driver: Driver) -> None:
    for run in "abc":
        driver.create(run, SPEC)


def same_gradient(actual: RunState, expected: RunState) -> None:
    """Up to the rounding of the same sums over rows that were padded otherwise."""
    assert actual.gradients is not None
    assert expected.gradients is not None
    for name, gradient in expected.gradients.items():
        near(actual.gradients[name], gradient, rel=1e-5)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with a marked row fail in their middle, after gradients were added to."""
    real = engine.run_pass

    def run_pass(base: Any, parts: Sequence[Part], *others: Any) -> Any:
        results = real(base, parts, *others)
        if any(datum.tokens[0] == MARK for part in parts for datum in part.data):
            raise torch.OutOfMemoryError("made by the test")
        return results

    monkeypatch.setattr(engine, "run_pass", run_pass)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        ("cross_entropy", "weights", float("nan")),
        ("cross_entropy", "weights", float("inf")),
        ("importance_sampling", "logprobs", -1e4),
    ],
)
def test_a_loss_that_is_not_finite_fails_alone(
    make: MakeDriver, loss: str, name: str, value: float
) -> None:
    rng = np.random.default_rng(0)
    driver = make(tokens_per_micro_batch=1000)
    three_runs(driver)
    good = batch(rng, loss=loss)
    driver.forward_backward("b", good)
    before = driver.state("b")
    bad = with_input(good, "weights", 1.0)
    ids = {
        "a": driver.submit("a", good),
        "b": driver.submit("b", with_input(bad, name, value)),
        "c": driver.submit("c", good),
    }
    outcomes = driver.drain()
    failure = outcomes[ids["b"]]
    assert isinstance(failure, InvalidRequest)
    assert "datum 0" in failure.message
    same(driver.state("b"), before)
    for run in "ac":
        expect(outcomes[ids[run]], ForwardBackwardResult)
        same_gradient(driver.state(run), before)


@pytest.mark.usefixtures("breaking")
def test_out_of_memory_fails_alone(make: MakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    driver = make(tokens_per_micro_batch=1000)
    three_runs(driver)
    good = batch(rng, (20, 9))
    driver.forward_backward("b", good)
    before = driver.state("b")
    ids = {run: driver.submit(run, good) for run in "ac"}
    bad = driver.submit("b", with_first_token(batch(rng, (20, 30)), MARK))
    outcomes = driver.drain()
    failure = outcomes[bad]
    assert isinstance(failure, ServiceFault)
    assert "memory" in failure.message
    assert failure.incident in caplog.text
    same(driver.state("b"), before)
    for run in "ac":
        expect(outcomes[ids[run]], ForwardBackwardResult)
        same_gradient(driver.state(run), before)
    expect(driver.do("b", OptimStep(adam=ADAM)), StepResult)


def unreadable(good: ForwardBackward) -> dict[str, ForwardBackward]:
    first, *others = good.data
    target = replace(first, target_tokens=np.full_like(first.target_tokens, 512))
    nothing = Datum(
        tokens=np.zeros(0, np.int32), target_tokens=np.zeros(0, np.int64), loss_inputs={}
    )
    return {
        "token": with_first_token(good, 512),
        "negative token": with_first_token(good, -1),
        "target": replace(good, data=(target, *others)),
        "empty datum": replace(good, data=(first, nothing)),
        "empty batch": replace(good, data=()),
    }


@pytest.mark.parametrize(
    "which", ["token", "negative token", "target", "empty datum", "empty batch"]
)
def test_what_the_model_cannot_read_fails_alone(make: MakeDriver, which: str) -> None:
    driver = make(tokens_per_micro_batch=1000)
    three_runs(driver)
    good = batch(np.random.default_rng(0))
    bodies = {"a": good, "b": unreadable(good)[which], "c": good}
    ids = [driver.submit(run, body) for run, body in bodies.items()]
    a, b, c = (driver.drain()[work_id] for work_id in ids)
    assert isinstance(b, InvalidRequest)
    assert isinstance(a, ForwardBackwardResult)
    assert isinstance(c, ForwardBackwardResult)
    assert driver.state("b").gradients is None


@pytest.mark.parametrize(
    ("weight", "accepted"),
    [
        pytest.param(3e38, False, id="the loss overflows"),
        pytest.param(1e37, False, id="the gradient overflows"),
        pytest.param(1e30, True, id="its norm overflows"),
    ],
)
def test_what_overflows_never_reaches_the_weights(
    make: MakeDriver, weight: float, accepted: bool
) -> None:
    driver = make()
    driver.create("r", SPEC)
    before = driver.state("r")
    outcome = driver.do("r", with_input(batch(np.random.default_rng(0), (5,)), "weights", weight))
    assert isinstance(outcome, ForwardBackwardResult if accepted else InvalidRequest)
    if accepted:
        assert isinstance(driver.do("r", OptimStep(adam=ADAM)), InvalidRequest)
    same(driver.state("r"), before)


@pytest.mark.parametrize(
    "body",
    [
        batch(np.random.default_rng(0)),
        OptimStep(adam=ADAM),
        ExportState(gradients=True, optimizer=True),
    ],
    ids=["forward_backward", "optim_step", "export"],
)
def test_an_unknown_run(make: MakeDriver, body: WorkBody) -> None:
    assert isinstance(make().do("nobody", body), NotFound)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_run_that_cannot_be(make: MakeDriver, rank: int) -> None:
    """What was queued behind it is told that there is no run."""
    driver = make()
    refused = driver.submit("r", CreateRun(spec=LoraSpec(rank=rank, seed=0)))
    behind = driver.submit("r", batch(np.random.default_rng(0)))
    outcomes = driver.drain()
    assert isinstance(outcomes[refused], InvalidRequest)
    assert "1 to 16" in str(outcomes[refused])
    assert isinstance(outcomes[behind], NotFound)


def test_a_run_is_created_once(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", SPEC)
    assert isinstance(driver.do("r", CreateRun(spec=SPEC)), InvalidRequest)
    assert driver.trainer.runs() == (RunId("r"),)


def test_a_load_waits_for_its_state_and_holds_back_its_run_alone(make: MakeDriver) -> None:
    driver = make()
    driver.create("a", SPEC)
    saved = driver.state("a")
    later: Future[RunState] = Future()
    load = driver.submit("b", LoadState(state=later, with_optimizer=True))
    behind = driver.submit("b", batch(np.random.default_rng(0)))
    beside = driver.submit("a", batch(np.random.default_rng(0)))
    assert driver.drain().keys() >= {beside}
    assert not driver.trainer.busy
    assert driver.trainer.step() == []
    later.set_result(saved)
    assert driver.trainer.busy
    outcomes = driver.drain()
    assert outcomes[load] is None
    assert isinstance(outcomes[behind], ForwardBackwardResult)


def bad_states(good: RunState) -> dict[str, RunState | Exception]:
    weights = dict(good.adapter.weights)
    name, array = weights.popitem()
    other_shape = {**weights, name: array[:-1]}
    return {
        "missing": replace(good, adapter=replace(good.adapter, weights=weights)),
        "shape": replace(good, adapter=replace(good.adapter, weights=other_shape)),
        "rank": replace(good, adapter=replace(good.adapter, spec=replace(SPEC, rank=8))),
        "unreadable": CheckpointCorrupt("half a file"),
        "unexpected": OSError("what"),
    }


@pytest.mark.parametrize(
    ("which", "error"),
    [
        ("missing", InvalidRequest),
        ("shape", InvalidRequest),
        ("rank", InvalidRequest),
        ("unreadable", CheckpointCorrupt),
        ("unexpected", ServiceFault),
    ],
)
def test_a_load_that_fails_leaves_the_run(
    make: MakeDriver, which: str, error: type[TwinkleDaskError]
) -> None:
    driver = make()
    driver.create("r", SPEC)
    before = driver.state("r")
    future: Future[RunState] = Future()
    given = bad_states(before)[which]
    if isinstance(given, Exception):
        future.set_exception(given)
    else:
        future.set_result(given)
    assert isinstance(driver.do("r", LoadState(state=future, with_optimizer=True)), error)
    same(driver.state("r"), before)
    if which != "rank":
        assert isinstance(driver.do("new", LoadState(state=future, with_optimizer=True)), error)
        assert RunId("new") not in driver.trainer.runs()


def test_drop_forgets_queued_work(make: MakeDriver) -> None:
    driver = make(tokens_per_micro_batch=20)
    driver.create("r", SPEC)
    driver.create("other", SPEC)
    queued = (driver.submit("r", batch(np.random.default_rng(0), (15, 15, 15))),)
    queued += (driver.submit("r", OptimStep(adam=ADAM)),)
    beside = driver.submit("other", batch(np.random.default_rng(0)))
    driver.trainer.step()
    assert driver.trainer.drop_run(RunId("r")) == queued
    assert driver.drain().keys() & {*queued, beside} == {beside}
    assert driver.trainer.drop_run(RunId("r")) == ()
    assert driver.trainer.runs() == (RunId("other"),)
    assert isinstance(driver.do("r", OptimStep(adam=ADAM)), NotFound)


def test_steps_and_passes_alternate(make: MakeDriver) -> None:
    """A tenant who only steps cannot keep others from their passes, nor the other way round."""
    driver = make(tokens_per_micro_batch=8)
    driver.create("steps", SPEC)
    driver.create("rows", SPEC)
    for _ in range(4):
        driver.submit("steps", OptimStep(adam=ADAM))
    driver.submit("rows", batch(np.random.default_rng(0), (8, 8, 8, 8)))
    tokens, ended = [driver.trainer.tokens_done], 0
    for _ in range(8):
        ended += len(driver.trainer.step())
        tokens.append(driver.trainer.tokens_done)
    assert ended == 5
    assert np.diff(tokens).tolist() == [8, 0] * 4


def test_a_run_is_the_same_whether_its_pass_was_tried_again(
    make: MakeDriver, breaking: None
) -> None:
    good = batch(np.random.default_rng(0), (20, 9))
    states: list[RunState] = []
    for marked in (False, True):
        driver = make(tokens_per_micro_batch=1000)
        three_runs(driver)
        driver.submit("a", good)
        driver.submit("b", with_first_token(good, MARK) if marked else good)
        driver.drain()
        states.append(driver.state("a"))
    same_gradient(states[1], states[0])


def test_length_groups() -> None:
    assert length_groups([9, 9, 8, 3, 2, 2], padding_tokens=4) == [slice(0, 3), slice(3, 6)]
    assert length_groups([9, 8, 7, 6], padding_tokens=3) == [slice(0, 3), slice(3, 4)]
    assert length_groups([5], padding_tokens=0) == [slice(0, 1)]
