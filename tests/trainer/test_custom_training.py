"""Custom losses in the trainer: what the client's own way gives, beside everybody else's work."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import MakeDriver
from tests.trainer.custom_losses import (
    CASES,
    Case,
    Returned,
    clipped,
    custom,
    handle_of,
    inputs_for,
    marked,
)
from tests.trainer.driver import ADAM, Driver, batch
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.work import CreateRun
from twinkle_dask.types import (
    CustomLoss,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
)

SPEC = LoraSpec(rank=4, seed=1)
LENGTHS = (5, 17, 9, 1)


def custom_batch(case: Case, *, backward: bool = True) -> ForwardBackward:
    """Random tokens with the inputs that a loss reads."""
    function, ranks = case
    rng = np.random.default_rng(7)
    data: list[Datum] = []
    for length in LENGTHS:
        shape = (length, 3) if ranks["logprobs"] == 2 else (length,)
        values = inputs_for(ranks, length, seed=length)[1:]
        inputs = {name: v.numpy() for name, v in zip(list(ranks)[1:], values, strict=True)}
        data.append(
            Datum(
                tokens=rng.integers(0, 512, length).astype(np.int32),
                target_tokens=rng.integers(0, 512, shape),
                loss_inputs={},
                custom_inputs=inputs,
            )
        )
    return ForwardBackward(data=tuple(data), loss=custom(function, ranks), backward=backward)


def by_the_client(driver: Driver, run: str, body: ForwardBackward, case: Case) -> float:
    """What the SDK does where the server has no custom losses; gives the loss."""
    function, ranks = case
    bare = tuple(replace(datum, custom_inputs={}) for datum in body.data)
    cross_entropy = batch(np.random.default_rng(0), [2]).loss
    forward = driver.forward_backward(
        run, ForwardBackward(data=bare, loss=cross_entropy, backward=False)
    )
    leaves = [torch.tensor(lp, requires_grad=True) for lp in forward.logprobs]
    handle = handle_of(function, ranks)
    total = torch.zeros(())
    for leaf, datum in zip(leaves, body.data, strict=True):
        given = [torch.tensor(datum.custom_inputs[name]) for name in list(ranks)[1:]]
        total = total + handle.graph(leaf, *given)[0]
    slopes = torch.autograd.grad(total, leaves)
    weighted = [
        replace(datum, loss_inputs={"weights": -slope.numpy()})
        for datum, slope in zip(bare, slopes, strict=True)
    ]
    driver.forward_backward(run, ForwardBackward(data=tuple(weighted), loss=cross_entropy))
    return float(total.detach())


def prepared(driver: Driver, *runs: str) -> None:
    """Runs whose B is not zero any more."""
    for run in runs:
        driver.create(run, SPEC)
        driver.forward_backward(run, batch(np.random.default_rng(5)))
        driver.step(run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("lanes", [1, 2])
def test_gradients_are_those_of_the_clients_own_way(
    make: MakeDriver, case: Case, lanes: int
) -> None:
    driver = make(lanes=lanes, tokens_per_micro_batch=64 * len(LENGTHS))
    prepared(driver, "server", "client")
    body = custom_batch(case)
    result = driver.forward_backward("server", body)
    expected = by_the_client(driver, "client", body, case)
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    ours, theirs = driver.gradients("server"), driver.gradients("client")
    for name in theirs:
        # The same slopes up to 1e-6 through the same backward.
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_forward_only_leaves_nothing(make: MakeDriver) -> None:
    driver = make()
    prepared(driver, "a")
    learning = driver.forward_backward("a", custom_batch(CASES[1]))
    driver.step("a", replace(ADAM, learning_rate=0.0))
    forward = driver.forward_backward("a", custom_batch(CASES[1], backward=False))
    assert forward.metrics == pytest.approx(learning.metrics, rel=1e-5)
    assert driver.state("a").gradients is None
    assert set(forward.metrics) == {"loss:sum", "tokens:sum", "custom/clip_fraction:mean"}


def test_they_share_passes_with_other_work(make: MakeDriver) -> None:
    """Two custom losses of two tenants, and two of the built-in ones, as each of them alone."""
    rng = np.random.default_rng(3)
    bodies = {
        "a": custom_batch(CASES[2]),
        "b": batch(rng, (7, 11), "gspo"),
        "c": custom_batch(CASES[5]),
        "d": batch(rng, (3, 8), "cross_entropy", 3),
    }
    alone, together = make(tokens_per_micro_batch=512), make(tokens_per_micro_batch=512)
    for driver in (alone, together):
        prepared(driver, *bodies)
    expected = {run: alone.forward_backward(run, body) for run, body in bodies.items()}
    work = {run: together.submit(run, body, tenant=run) for run, body in bodies.items()}
    outcomes = together.drain()
    for run, result in expected.items():
        found = outcomes[work[run]]
        assert isinstance(found, ForwardBackwardResult)
        assert found.metrics == pytest.approx(result.metrics, rel=1e-5)
        ours, theirs = together.gradients(run), alone.gradients(run)
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def infinite(logprobs: torch.Tensor, mask: torch.Tensor) -> Returned:
    """Without a value where the mask is 0 everywhere."""
    return (logprobs * mask).sum() / mask.sum(), {}


def steep(logprobs: torch.Tensor, mask: torch.Tensor) -> Returned:
    """Without a derivative there."""
    return torch.sqrt((logprobs * mask).square().sum()), {}


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (infinite, "'infinite' failed on datum 2: its value is nan"),
        (steep, r"'steep' failed on datum 2: its gradient by logprobs\[0\] is NaN"),
        (marked, "'marked' failed on datum 2: its value is nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_that_fails_fails_alone_and_adds_nothing(
    make: MakeDriver, monkeypatch: pytest.MonkeyPatch, loss: object, problem: str
) -> None:
    driver = make(tokens_per_micro_batch=512)
    prepared(driver, "bad", "good")
    case: Case = (loss, {"logprobs": 1, "mask": 1})  # pyright: ignore[reportAssignmentType]
    body = custom_batch(case)
    data = list(body.data)
    data[2] = replace(data[2], custom_inputs={"mask": np.zeros(LENGTHS[2], np.float32)})
    bad = driver.submit("bad", replace(body, data=tuple(data)), tenant="one")
    good = driver.submit("good", custom_batch(CASES[0]), tenant="two")
    passes: list[int] = []
    run_pass = driver.trainer._pass  # pyright: ignore[reportPrivateUsage]

    def counted(members: Any) -> Any:
        passes.append(len(members))
        return run_pass(members)

    monkeypatch.setattr(driver.trainer, "_pass", counted)
    outcomes = driver.drain()
    failed = outcomes[bad]
    assert isinstance(failed, InvalidRequest)
    with pytest.raises(InvalidRequest, match=problem):
        raise failed
    assert isinstance(outcomes[good], ForwardBackwardResult)
    assert passes == [2]  # nothing was computed twice
    assert driver.state("bad").gradients is None
    assert driver.step("bad") == {"grad_norm:mean": 0.0}
    assert driver.step("good")["grad_norm:mean"] > 0


def test_a_loss_that_does_too_much_fails_before_it_does(make: MakeDriver) -> None:
    def huge(logprobs: torch.Tensor) -> Returned:
        return logprobs.repeat(10**7).sum(), {}

    driver = make()
    driver.create("a", SPEC)
    with pytest.raises(InvalidRequest, match="more work than is allowed"):
        driver.forward_backward("a", custom_batch((huge, {"logprobs": 1})))


def test_learning_by_a_custom_loss(make: MakeDriver) -> None:
    driver = make()
    driver.do("a", CreateRun(spec=SPEC))
    body = custom_batch((clipped, CASES[1][1]))
    assert isinstance(body.loss, CustomLoss)
    losses: list[float] = []
    for _ in range(3):
        losses.append(driver.forward_backward("a", body).metrics["loss:sum"])
        driver.do("a", OptimStep(adam=replace(ADAM, learning_rate=1e-3)))
    assert losses[2] < losses[1] < losses[0]
