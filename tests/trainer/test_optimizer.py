"""AdamW against torch.optim.AdamW; a flat buffer must not show."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from twinkle_dask.trainer.optimizer import Moments, adamw_step, clip_scale
from twinkle_dask.types import AdamParams


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(learning_rate=1e-2),
        AdamParams(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.999, eps=1e-8),
        AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=2.0),
    ],
    ids=["defaults", "decay", "clipping"],
)
def test_twenty_steps(adam: AdamParams) -> None:
    """Gradients over twelve decades: some vanish beside eps, some dominate the norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 33), (5, 8), (1, 1)]
    plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights = torch.cat([p.detach().flatten() for p in plain])
    reference: Any = torch.optim.AdamW(plain, foreach=False, fused=False)
    moments = Moments.fresh(weights)
    for step in range(20):
        now = replace(adam, learning_rate=adam.learning_rate / (1 + step))
        settings = {
            "lr": now.learning_rate,
            "betas": (now.beta1, now.beta2),
            "eps": now.eps,
            "weight_decay": now.weight_decay,
        }
        reference.param_groups[0].update(settings)
        for p in plain:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (-(step * 7) % 12)
        gradient = torch.cat([g.flatten() for p in plain if (g := p.grad) is not None])
        if now.grad_clip_norm:
            norm = nn.utils.clip_grad_norm_(plain, now.grad_clip_norm)
            gradient *= clip_scale(float(norm), now.grad_clip_norm)
        reference.step()
        adamw_step(weights, gradient, moments, now)
    # The fused kernel rounds in another order: one or two units in the last place for each step.
    expected = torch.cat([p.detach().flatten() for p in plain])
    torch.testing.assert_close(weights, expected, rtol=5e-6, atol=1e-6)
    assert moments.step == 20


def test_clip_scale() -> None:
    assert clip_scale(10.0, 0.0) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(2.0, 1.0) == pytest.approx(0.5)
