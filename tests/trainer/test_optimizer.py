"""AdamW against torch.optim.AdamW; a flat buffer, taken in pieces, must not show."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import batch
from twinkle_dask.trainer import optimizer
from twinkle_dask.trainer.optimizer import Moments, StepNorms, adamw_step, clip_scale, norm
from twinkle_dask.types import AdamParams, Float32Array, LoraSpec

ADAMS = [
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.999, eps=1e-8),
    AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=2.0),
]


def steps_of(adam: AdamParams) -> list[AdamParams]:
    """Every setting changes with every step, as under a client's schedules."""
    return [
        replace(
            adam,
            learning_rate=adam.learning_rate / (1 + step),
            beta1=adam.beta1 - 0.01 * (step % 5),
            beta2=adam.beta2 - 0.001 * step,
            eps=adam.eps * (1 + step),
            weight_decay=adam.weight_decay * (step % 3),
            grad_clip_norm=adam.grad_clip_norm * (1 + step % 2),
        )
        for step in range(20)
    ]


def reference_step(reference: Any, plain: Sequence[nn.Parameter], adam: AdamParams) -> None:
    settings = {
        "lr": adam.learning_rate,
        "betas": (adam.beta1, adam.beta2),
        "eps": adam.eps,
        "weight_decay": adam.weight_decay,
    }
    reference.param_groups[0].update(settings)
    if adam.grad_clip_norm:
        nn.utils.clip_grad_norm_(plain, adam.grad_clip_norm)
    reference.step()


def our_step(weights: Tensor, gradient: Tensor, moments: Moments, adam: AdamParams) -> StepNorms:
    gradient = gradient * clip_scale(float(norm(gradient)), adam.grad_clip_norm)
    return adamw_step(weights, gradient, moments, adam)


def gradient_of(step: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Over twelve decades: some vanish beside eps, some dominate the norm."""
    return torch.randn(*shape, generator=generator) * 10.0 ** (-(step * 7) % 12)


@pytest.mark.parametrize("adam", ADAMS, ids=["defaults", "decay", "clipping"])
@pytest.mark.parametrize("size", [1, 1000, 3 * 256 + 5])
def test_twenty_steps_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, adam: AdamParams, size: int
) -> None:
    """One tensor of torch's fused AdamW, also where it is taken in several pieces here."""
    monkeypatch.setattr(optimizer, "_PIECE_ON_CPU", 256)
    generator = torch.Generator().manual_seed(0)
    plain = nn.Parameter(torch.randn(size, generator=generator))
    weights = plain.detach().clone()
    reference: Any = torch.optim.AdamW([plain], fused=True)
    moments = Moments.fresh(weights)
    for step, now in enumerate(steps_of(adam)):
        gradient = gradient_of(step, (size,), generator)
        plain.grad = gradient.clone()
        before = weights.clone()
        reference_step(reference, [plain], now)
        norms = our_step(weights, gradient, moments, now)
        assert torch.equal(weights, plain.detach())
        assert norms.weight == pytest.approx(float(norm(weights)), rel=1e-5)
        assert norms.update == pytest.approx(float(norm(weights - before)), rel=1e-5)
    assert moments.step == 20
    state = reference.state[plain]
    assert torch.equal(moments.exp_avg, state["exp_avg"])
    assert torch.equal(moments.exp_avg_sq, state["exp_avg_sq"])


@pytest.mark.parametrize("adam", ADAMS, ids=["defaults", "decay", "clipping"])
def test_twenty_steps_of_separate_tensors(adam: AdamParams) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 33), (5, 8), (1, 1)]
    plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights = torch.cat([p.detach().flatten() for p in plain])
    reference: Any = torch.optim.AdamW(plain, foreach=False, fused=False)
    moments = Moments.fresh(weights)
    for step, now in enumerate(steps_of(adam)):
        for p in plain:
            p.grad = gradient_of(step, p.shape, generator)
        gradient = torch.cat([g.flatten() for p in plain if (g := p.grad) is not None])
        reference_step(reference, plain, now)
        our_step(weights, gradient, moments, now)
    # The fused kernel rounds in another order: one or two units in the last place for each step.
    expected = torch.cat([p.detach().flatten() for p in plain])
    torch.testing.assert_close(weights, expected, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 0.7, 1.0, 12.3, 1e15])
@pytest.mark.parametrize("max_norm", [1e-4, 1.0, 10.0])
def test_clipping_bit_for_bit(size: float, max_norm: float) -> None:
    gradient = torch.randn(500, generator=torch.Generator().manual_seed(1)) * size
    plain = nn.Parameter(torch.zeros(500))
    plain.grad = gradient.clone()
    nn.utils.clip_grad_norm_([plain], max_norm)
    assert torch.equal(gradient * clip_scale(float(norm(gradient)), max_norm), plain.grad)


def test_no_clipping() -> None:
    assert clip_scale(10.0, 0.0) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0


def length(arrays: Iterable[Float32Array]) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays)))


def test_metrics_of_a_step(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", LoraSpec(rank=2, seed=0))
    assert driver.step("r") == {"grad_norm:mean": 0.0}
    before = driver.state("r").adapter.weights
    body = batch(np.random.default_rng(0))
    for step in (1, 2):
        driver.forward_backward("r", body)
        unspent = driver.state("r").gradients or {}
        metrics = driver.step("r", AdamParams(learning_rate=0.5 / step, grad_clip_norm=1e-3))
        after = driver.state("r").adapter.weights
        expected = {
            "grad_norm:mean": length(unspent.values()),
            "update_norm:mean": length(after[name] - before[name] for name in after),
            "weight_norm:mean": length(after.values()),
            "learning_rate:mean": 0.5 / step,
            "step:max": float(step),
        }
        assert metrics == pytest.approx(expected, rel=1e-5)
        before = after
