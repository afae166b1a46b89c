"""The engine against plain PyTorch, together against alone, and stopped against never stopped.

Everything is float32 on one thread. Engine and reference do the same sums in another order, over
64 to 512 terms in each of some 20 products; that is worth a few 1e-6 of the largest entry. The
tolerance of 1e-4 of the norm leaves room for Adam, which divides small gradients by their size.
"""

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tests.trainer import dense
from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.trainer.work import CreateRun, ExportState, LoadState
from twinkle_dask.types import (
    AdamParams,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    LossName,
    OptimStep,
    RunState,
)

SPECS = (
    LoraSpec(rank=4, seed=1),
    LoraSpec(rank=1, seed=2, train_unembed=False),
    LoraSpec(rank=16, seed=3, train_attn=False),
    LoraSpec(rank=8, seed=4, train_attn=False, train_mlp=False),
    LoraSpec(rank=4, seed=5, rslora=True, targets=("k_proj", "layers.1.mlp.up_proj", "lm_head")),
)


def near(actual: Float32Array | Tensor, expected: Float32Array | Tensor, rel: float = 1e-4) -> None:
    """Near in the 2-norm: single entries of a sum may cancel to any relative error."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= rel * np.linalg.norm(b) + 1e-7


def same(actual: RunState, expected: RunState) -> None:
    """Equal bit for bit."""
    assert actual.optimizer is not None
    assert expected.optimizer is not None
    assert actual.optimizer.step == expected.optimizer.step
    pairs = [
        (actual.adapter.weights, expected.adapter.weights),
        (actual.optimizer.exp_avg, expected.optimizer.exp_avg),
        (actual.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq),
        (actual.gradients or {}, expected.gradients or {}),
    ]
    for a, b in pairs:
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def moved(driver: Driver, run: str, spec: LoraSpec, rng: np.random.Generator) -> None:
    """A run whose B is no longer zero."""
    driver.create(run, spec)
    driver.forward_backward(run, batch(rng))
    driver.step(run)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("name", "targets"), [*((name, None) for name in LossName), (LossName.CROSS_ENTROPY, 3)]
)
def test_logprobs_loss_and_gradient(
    make: MakeDriver, folder: Path, spec: LoraSpec, name: LossName, targets: int | None
) -> None:
    rng = np.random.default_rng(0)
    driver = make()
    moved(driver, "r", spec, rng)
    reference = dense.DenseRun(dense.load(folder), driver.state("r").adapter)
    body = batch(rng, (30, 7, 45, 1, 16), name, targets)
    result = driver.forward_backward("r", body)
    logprobs, total = reference.forward_backward(body)
    for ours, theirs, datum in zip(result.logprobs, logprobs, body.data, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == datum.target_tokens.shape
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    assert result.metrics["tokens:sum"] == 99
    gradients = driver.state("r").gradients
    assert gradients is not None
    for key, leaf in reference.weights.items():
        assert leaf.grad is not None
        near(gradients[key], leaf.grad)


@pytest.mark.parametrize("adam", [ADAM, AdamParams(learning_rate=5e-3, weight_decay=0.1)])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_trajectory(make: MakeDriver, folder: Path, adam: AdamParams, clip: float) -> None:
    """Five steps of two accumulated batches each; eps is raised where Adam would amplify noise."""
    adam = replace(adam, grad_clip_norm=clip, eps=1e-6)
    rng = np.random.default_rng(1)
    driver = make()
    driver.create("r", SPECS[0])
    reference = dense.DenseRun(dense.load(folder), driver.state("r").adapter)
    for _ in range(5):
        for _ in range(2):
            body = batch(rng)
            result = driver.forward_backward("r", body)
            _, total = reference.forward_backward(body)
            assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
        metrics = driver.step("r", adam)
        assert metrics["grad_norm:mean"] == pytest.approx(reference.step(adam), rel=1e-4)
    weights = driver.state("r").adapter.weights
    for name, leaf in reference.weights.items():
        near(weights[name], leaf.detach(), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_together_equals_alone(make: MakeDriver, seed: int) -> None:
    """Every run's results and weights are what they are without the others, whatever they do."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, (len(SPECS), 3, 2, 3)).tolist()
    losses = rng.choice(list(LossName), len(SPECS))
    adam = replace(ADAM, eps=1e-6)

    def plan(run: int) -> list[ForwardBackward | OptimStep]:
        own = np.random.default_rng(100 + run)
        bodies: list[ForwardBackward | OptimStep] = []
        for step in lengths[run]:
            bodies += [batch(own, sizes, losses[run]) for sizes in step]
            bodies += [batch(own, (3,), backward=False), OptimStep(adam=adam)]
        return bodies

    together = make(tokens_per_micro_batch=int(rng.integers(20, 200)))
    ids: list[list[str]] = []
    for run, spec in enumerate(SPECS):
        together.submit(f"r{run}", CreateRun(spec=spec), f"t{run % 3}")
        ids.append([together.submit(f"r{run}", body, f"t{run % 3}") for body in plan(run)])
    mixed = together.drain()
    for run, spec in enumerate(SPECS):
        alone = make(tokens_per_micro_batch=10_000, pass_tokens=10_000)
        alone.create("r", spec)
        for work_id, body in zip(ids[run], plan(run), strict=True):
            ours, theirs = mixed[work_id], alone.do("r", body)
            assert type(ours) is type(theirs)
            if isinstance(ours, ForwardBackwardResult) and isinstance(
                theirs, ForwardBackwardResult
            ):
                for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        state, expected = together.state(f"r{run}"), alone.state("r")
        for name, weight in expected.adapter.weights.items():
            near(state.adapter.weights[name], weight, rel=1e-3)


def test_accumulated_equals_at_once(make: MakeDriver) -> None:
    rng = np.random.default_rng(2)
    driver = make()
    for run in ("parts", "whole"):
        moved(driver, run, SPECS[0], np.random.default_rng(5))
    body = batch(rng, (20, 31, 8, 12))
    for data in (body.data[:1], body.data[1:]):
        driver.submit("parts", replace(body, data=data))
    driver.submit("whole", body)
    driver.drain()
    parts, whole = driver.state("parts").gradients, driver.state("whole").gradients
    assert parts is not None
    assert whole is not None
    for name in whole:
        near(parts[name], whole[name], rel=1e-5)


def test_forward_only_changes_nothing(make: MakeDriver) -> None:
    rng = np.random.default_rng(3)
    driver = make()
    moved(driver, "r", SPECS[0], rng)
    before = driver.state("r")
    body = batch(rng, loss="ppo")
    forward = driver.forward_backward("r", replace(body, backward=False))
    same(driver.state("r"), before)
    backward = driver.forward_backward("r", body)
    assert forward.metrics == pytest.approx(dict(backward.metrics), rel=1e-6)
    for a, b in zip(forward.logprobs, backward.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("unspent", [True, False])
def test_stopped_and_resumed_equals_never_stopped(
    make: MakeDriver, spec: LoraSpec, unspent: bool
) -> None:
    """Bit for bit, with a gradient under way or without, into a new trainer or over an old run."""
    bodies = [batch(np.random.default_rng(seed)) for seed in range(4)]
    straight = make()
    straight.create("r", spec)
    straight.forward_backward("r", bodies[0])
    straight.step("r")
    if unspent:
        straight.forward_backward("r", bodies[1])
    saved: Future[RunState] = Future()
    saved.set_result(straight.state("r"))

    fresh, over = make(), make()
    over.create("r", replace(spec, seed=99))
    over.forward_backward("r", bodies[3])
    for driver in (straight, fresh, over):
        if driver is not straight:
            assert driver.do("r", LoadState(state=saved, with_optimizer=True)) is None
        for body in bodies[2:]:
            driver.forward_backward("r", body)
            driver.step("r")
    same(fresh.state("r"), straight.state("r"))
    same(over.state("r"), straight.state("r"))


def test_an_export_is_a_copy_at_its_place_in_the_order(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", SPECS[0])
    driver.submit("r", batch(np.random.default_rng(0)))
    early = driver.submit("r", ExportState(gradients=True, optimizer=True))
    driver.submit("r", OptimStep(adam=ADAM))
    late = driver.submit("r", ExportState(gradients=False, optimizer=True))
    outcomes = driver.drain()
    first, second = outcomes[early], outcomes[late]
    assert isinstance(first, RunState)
    assert isinstance(second, RunState)
    assert first.gradients is not None
    assert first.optimizer is not None
    assert (first.optimizer.step, dict(first.optimizer.exp_avg)) == (0, {})
    assert second.gradients is None
    assert second.optimizer is not None
    assert second.optimizer.step == 1
    assert not any(w.any() for n, w in first.adapter.weights.items() if ".lora_B." in n)
    assert any(w.any() for n, w in second.adapter.weights.items() if ".lora_B." in n)


def test_without_its_optimizer_a_state_starts_over(make: MakeDriver) -> None:
    driver = make()
    moved(driver, "r", SPECS[0], np.random.default_rng(0))
    saved: Future[RunState] = Future()
    saved.set_result(driver.state("r"))
    driver.do("copy", LoadState(state=saved, with_optimizer=False))
    state = driver.state("copy")
    assert state.optimizer is not None
    assert state.optimizer.step == 0
    for name, weight in saved.result().adapter.weights.items():
        np.testing.assert_array_equal(state.adapter.weights[name], weight)


def test_a_step_without_gradient_changes_nothing(make: MakeDriver) -> None:
    driver = make()
    moved(driver, "r", SPECS[0], np.random.default_rng(0))
    before = driver.state("r")
    assert driver.step("r", replace(ADAM, weight_decay=0.5)) == {"grad_norm:mean": 0.0}
    same(driver.state("r"), before)


def test_an_adapter_on_nothing(make: MakeDriver) -> None:
    """All groups off is a legal wish: nothing learns, everything answers."""
    driver = make()
    driver.create(
        "r", LoraSpec(rank=1, seed=0, train_attn=False, train_mlp=False, train_unembed=False)
    )
    driver.forward_backward("r", batch(np.random.default_rng(0)))
    metrics = driver.step("r")
    assert metrics["grad_norm:mean"] == metrics["update_norm:mean"] == 0.0
    assert driver.state("r").adapter.weights == {}


def test_bfloat16_is_near_float32(make: MakeDriver, made: list[Driver], folder: Path) -> None:
    """Products in bfloat16 (8 bits of mantissa, 0.4 %); masters and sums stay float32."""
    coarse = load_base(str(folder), "bfloat16", max_rank=16)
    body = batch(np.random.default_rng(4), (30, 7, 45))
    results: list[ForwardBackwardResult] = []
    gradients: list[Float32Array] = []
    first = make()
    moved(first, "m", SPECS[0], np.random.default_rng(5))
    saved: Future[RunState] = Future()
    saved.set_result(first.state("m"))
    second = Driver(Trainer(coarse, TrainerConfig()))
    made.append(second)
    for driver in (first, second):
        driver.do("r", LoadState(state=saved, with_optimizer=True))
        results.append(driver.forward_backward("r", body))
        state = driver.state("r")
        assert state.gradients is not None
        assert {a.dtype for a in state.gradients.values()} == {np.dtype(np.float32)}
        assert {a.dtype for a in state.adapter.weights.values()} == {np.dtype(np.float32)}
        gradients.append(np.concatenate([g.ravel() for g in state.gradients.values()]))
    for exact, ours in zip(results[0].logprobs, results[1].logprobs, strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.1)
    near(gradients[1], gradients[0], rel=0.05)
