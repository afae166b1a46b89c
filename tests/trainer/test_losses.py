"""Each loss and its slope against autograd on the formula as the reference writes it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.dense import loss as dense_loss
from tests.trainer.driver import batch
from twinkle_dask.losses import loss_spec
from twinkle_dask.trainer.losses import token_loss
from twinkle_dask.types import LossName


def inputs_of(name: LossName, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(seed)
    datum = batch(rng, [500], name).data[0]
    inputs = {key: torch.tensor(value) for key, value in datum.loss_inputs.items()}
    lp_T = torch.tensor(rng.normal(-np.log(512), 0.3, 500), dtype=torch.float32)
    return lp_T.requires_grad_(), inputs


@pytest.mark.parametrize("name", LossName)
@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_slope(name: LossName, weighted: bool) -> None:
    lp_T, inputs = inputs_of(name, seed=1)
    if not weighted:
        del inputs["weights"]
    spec = batch(np.random.default_rng(0), [1], name)
    expected = dense_loss(spec, lp_T, inputs)
    (expected_slope_T,) = torch.autograd.grad(expected, lp_T)
    value_T, slope_T = token_loss(spec.loss, lp_T.detach(), inputs)
    # The same float32 operations in another order: a few units in the last place.
    torch.testing.assert_close(value_T.sum(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope_T, expected_slope_T, rtol=1e-5, atol=1e-6)


def test_ppo_is_flat_only_beyond_the_bound_that_the_advantage_pushes_to() -> None:
    ratio_T = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0])
    inputs = {"logprobs": torch.zeros(6), "advantages": torch.tensor([1.0, -1, 1, -1, 1, -1])}
    spec = loss_spec("ppo", {"clip_low_threshold": 0.75, "clip_high_threshold": 1.5})
    value_T, slope_T = token_loss(spec, ratio_T.log(), inputs)
    torch.testing.assert_close(value_T, torch.tensor([-0.5, 0.75, -1.0, 1.0, -1.5, 2.0]))
    torch.testing.assert_close(slope_T, torch.tensor([-0.5, 0.0, -1.0, 1.0, 0.0, 2.0]))


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_a_masked_token_adds_nothing_even_if_its_ratio_overflows(name: str) -> None:
    inputs = {
        "logprobs": torch.tensor([-1e4, -1.0]),
        "advantages": torch.tensor([1.0, 1.0]),
        "weights": torch.tensor([0.0, 1.0]),
    }
    value_T, slope_T = token_loss(loss_spec(name, {}), torch.tensor([-1.0, -1.0]), inputs)
    assert torch.equal(value_T, torch.tensor([0.0, -1.0]))
    assert torch.equal(slope_T, torch.tensor([0.0, -1.0]))
