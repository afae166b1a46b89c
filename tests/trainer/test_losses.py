"""Each loss and its slope against autograd on the formula as the reference writes it."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.dense import loss as dense_loss
from tests.trainer.driver import batch
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import LOSSES, loss_spec
from twinkle_dask.model.base import HeadProjection
from twinkle_dask.model.lora import LoraTensors, Segment
from twinkle_dask.trainer.head import Scored, Targets, score
from twinkle_dask.trainer.loss_metrics import loss_metrics
from twinkle_dask.trainer.losses import (
    SEQUENCE_LOG_RATIO,
    ValueAndSlope,
    sequence_log_ratios,
    token_loss,
)
from twinkle_dask.trainer.mixed_loss import MixedLoss
from twinkle_dask.types import Datum, ForwardBackward, LoraSpec, LossName, LossSpec

OFF_POLICY = [name for name in LossName if LOSSES[name].off_policy]
CLIPPED = [name for name in LossName if "clip_high_threshold" in LOSSES[name].defaults]
CPU = torch.device("cpu")


def inputs_of(name: LossName, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(seed)
    datum = batch(rng, [500], name).data[0]
    inputs = {key: torch.tensor(value) for key, value in datum.loss_inputs.items()}
    lp_T = torch.tensor(rng.normal(-np.log(512), 0.3, 500), dtype=torch.float32)
    return lp_T, inputs


def evaluate(
    name: str, lp_T: Tensor, inputs: Mapping[str, Tensor], **config: float
) -> ValueAndSlope:
    """The loss of one datum."""
    spec = loss_spec(name, config)
    known = dict(inputs)
    if LOSSES[spec.name].sequence_level:
        (marked_M,) = torch.nonzero(inputs["sequence_ratio_mask"], as_tuple=True)
        q_M = inputs["logprobs"][marked_M]
        log_ratio = sequence_log_ratios(lp_T[marked_M], q_M, torch.zeros_like(marked_M), 1)
        known[SEQUENCE_LOG_RATIO] = log_ratio.expand(len(lp_T))
    return token_loss(spec, lp_T, known)


@pytest.mark.parametrize("name", LossName)
@pytest.mark.parametrize("absent", [(), ("weights",), ("clip_low_threshold",), ("clip",)], ids=str)
def test_value_and_slope(name: LossName, absent: tuple[str, ...]) -> None:
    """With and without each optional input: thresholds are then those of the settings."""
    lp_T, inputs = inputs_of(name, seed=1)
    inputs = {key: value for key, value in inputs.items() if not key.startswith(absent or "-")}
    body = batch(np.random.default_rng(0), [1], name)
    lp_T.requires_grad_()
    expected = dense_loss(body, lp_T, inputs)
    (expected_slope_T,) = torch.autograd.grad(expected, lp_T)
    value_T, slope_T = evaluate(name, lp_T.detach(), inputs)
    # The same float32 operations in another order: a few units in the last place.
    torch.testing.assert_close(value_T.sum(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(slope_T, expected_slope_T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OFF_POLICY)
@pytest.mark.parametrize("log_ratio", [-80.0, -5.0, 0.0, 5.0, 80.0])
def test_extreme_ratios(name: LossName, log_ratio: float) -> None:
    """In double precision the formulas hold there too."""
    lp_T = torch.tensor([-90.0, -81.0, -85.5]) + max(0.0, log_ratio)
    inputs = {
        "logprobs": lp_T - log_ratio,
        "advantages": torch.tensor([1.0, -0.5, 0.0]),
        "sequence_ratio_mask": torch.ones(3),
    }
    leaf_T = lp_T.double().requires_grad_()
    expected = dense_loss(
        batch(np.random.default_rng(0), [1], name),
        leaf_T,
        {key: value.double() for key, value in inputs.items()},
    )
    (expected_slope_T,) = torch.autograd.grad(expected, leaf_T)
    value_T, slope_T = evaluate(name, lp_T, inputs)
    torch.testing.assert_close(value_T.double().sum(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope_T.double(), expected_slope_T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("high", [0.5, 1.0, 2.0])
def test_stable_reinforce_has_a_bounded_slope_and_a_smooth_value(high: float) -> None:
    """However far apart the policies are; and its KL term pulls towards the sampler, always."""
    log_ratio_T = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e30, 1e30])])
    config = {"kl_coeff": 0.3, "clip_high_threshold": high}
    for advantage in (-2.0, 1.0):
        inputs = {
            "logprobs": -log_ratio_T,
            "advantages": torch.full_like(log_ratio_T, advantage),
        }
        value_T, slope_T = evaluate(
            "stable_reinforce", torch.zeros_like(log_ratio_T), inputs, **config
        )
        assert torch.isfinite(value_T).all()
        assert (slope_T.abs() <= high * abs(advantage) + 0.3 * max(1.0, high - 1) + 1e-6).all()
        # With lp = 0 the value is the KL term alone: never negative below the bound, and its
        # differences are its slope.
        assert (value_T[log_ratio_T <= math.log(high)] >= -1e-6).all()
        steps = value_T[1:4001].double() - value_T[:4000].double()
        kl_slope_T = slope_T + log_ratio_T.exp().clamp(max=high) * advantage
        between = (kl_slope_T[1:4001] + kl_slope_T[:4000]) / 2
        # float32 values up to 60, whose differences are kept to 4e-6; the trapezoid's own error.
        torch.testing.assert_close(steps, between.double() * 0.1, rtol=0, atol=1e-3)


def test_ppo_is_flat_only_beyond_the_bound_that_the_advantage_pushes_to() -> None:
    ratio_T = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0])
    inputs = {"logprobs": torch.zeros(6), "advantages": torch.tensor([1.0, -1, 1, -1, 1, -1])}
    config = {"clip_low_threshold": 0.75, "clip_high_threshold": 1.5}
    value_T, slope_T = evaluate("ppo", ratio_T.log(), inputs, **config)
    torch.testing.assert_close(value_T, torch.tensor([-0.5, 0.75, -1.0, 1.0, -1.5, 2.0]))
    torch.testing.assert_close(slope_T, torch.tensor([-0.5, 0.0, -1.0, 1.0, 0.0, 2.0]))


@pytest.mark.parametrize("name", OFF_POLICY)
@pytest.mark.parametrize("filler", [-1e4, 1e4, math.inf, -math.inf, math.nan])
def test_a_token_without_weight_adds_nothing_whatever_else_it_holds(
    name: LossName, filler: float
) -> None:
    inputs = {
        "logprobs": torch.tensor([filler, -1.0]),
        "advantages": torch.tensor([filler, 1.0]),
        "weights": torch.tensor([0.0, 1.0]),
        "sequence_ratio_mask": torch.tensor([0.0, 1.0]),
    }
    lp_T = torch.tensor([-1.0, -1.0])
    value_T, slope_T = evaluate(name, lp_T, inputs)
    alone = evaluate(name, lp_T[1:], {key: value[1:] for key, value in inputs.items()})
    assert torch.equal(value_T, torch.cat([torch.zeros(1), alone[0]]))
    assert torch.equal(slope_T, torch.cat([torch.zeros(1), alone[1]]))


@pytest.mark.parametrize("name", [name for name in OFF_POLICY if name != "dro"])
def test_a_token_without_advantage_adds_nothing(name: LossName) -> None:
    """Such as a prompt's, whose ``logprobs`` are a filler."""
    inputs = {
        "logprobs": torch.tensor([-1e4, 0.0]),
        "advantages": torch.zeros(2),
        "sequence_ratio_mask": torch.tensor([0.0, 1.0]),
    }
    for terms_T in evaluate(name, torch.tensor([-1.0, -9.0]), inputs):
        assert torch.equal(terms_T, torch.zeros(2))


# ---- many losses together, through the head


def full(head: HeadProjection, hidden_PD: Tensor, targets: Targets) -> Tensor:
    logits_PV = hidden_PD @ head.weight_VD.T
    return torch.log_softmax(logits_PV, -1)[targets.position_T, targets.token_T]


@pytest.mark.parametrize("chunk", [3, 17, 1000])
@pytest.mark.parametrize("order", ["together", "alternating", "gspo only"])
def test_mixed_losses_give_the_gradient_of_their_sum(chunk: int, order: str) -> None:
    """Full softmax and autograd; a sequence of GSPO lies across chunks and beside other losses."""
    rng = np.random.default_rng(3)
    names = list(LossName) if order != "gspo only" else [LossName.GSPO]
    lengths = [7, 1, 12]
    bodies = [batch(rng, lengths, name) for name in names]
    if order == "alternating":
        bodies = [
            replace(body, data=(body.data[i],)) for i in range(len(lengths)) for body in bodies
        ]
    data = [datum for body in bodies for datum in body.data]
    token_T = np.concatenate([datum.target_tokens for datum in data]) % 50
    place_T = np.arange(len(token_T) + 1)
    targets = Targets(torch.tensor(token_T), torch.tensor(place_T[:-1]), place_T)
    generator = torch.Generator().manual_seed(0)
    head = HeadProjection(
        weight_VD=torch.randn(50, 8, generator=generator), bias_V=None, path="lm_head"
    )
    hidden_PD = torch.randn(len(token_T), 8, generator=generator) / 4
    adapter = LoraTensors(LoraSpec(rank=1, seed=0), {}, dtype=torch.float32)

    leaf_PD = hidden_PD.clone().requires_grad_()
    lp_T = full(head, leaf_PD, targets)
    # Sampled near the model, so that each loss is on both sides of its bounds.
    sampled_T = lp_T.detach() + 0.3 * torch.randn(len(lp_T), generator=generator)
    start = 0
    total = torch.zeros(())
    parts: list[ForwardBackward] = []
    for body in bodies:
        near: list[Datum] = []
        for datum in body.data:
            here = slice(start, start := start + len(datum.tokens))
            inputs = dict(datum.loss_inputs)
            if "logprobs" in inputs:
                inputs["logprobs"] = sampled_T[here].numpy()
            tensors = {key: torch.tensor(value) for key, value in inputs.items()}
            total = total + dense_loss(body, lp_T[here], tensors)
            near.append(replace(datum, loss_inputs=inputs))
        parts.append(replace(body, data=tuple(near)))
    (expected_PD,) = torch.autograd.grad(total, leaf_PD)

    def scored(backward: bool) -> Scored:
        return score(
            head,
            hidden_PD,
            targets,
            [Segment(slice(0, len(hidden_PD)), adapter, None)],
            MixedLoss.of([(part.loss, part.data) for part in parts], CPU),
            backward=backward,
            chunk_bytes=chunk * 50 * 4,
            block_bytes=chunk * 50 * 2,
        )

    found = scored(backward=True)
    assert found.grad_PD is not None
    # float32; a few hundred terms of order 1.
    torch.testing.assert_close(found.logprobs_T, lp_T.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values_T.sum(), total.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.grad_PD, expected_PD, rtol=1e-4, atol=1e-5)
    assert torch.equal(scored(backward=False).values_T, found.values_T)


# ---- settings


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("nope", {}, "Unknown loss 'nope'.*cispo, cross_entropy, dro, gspo"),
        ("dro", {"gamma": 1.0}, "no setting 'gamma'; it takes: beta"),
        ("importance_sampling", {"beta": 1.0}, "it takes: no settings"),
        ("dro", {"beta": -0.1}, "'beta'.*at least 0, not -0.1"),
        ("stable_reinforce", {"kl_coeff": math.inf}, "'kl_coeff'.*finite"),
        ("ppo", {"clip_low_threshold": math.nan}, "finite"),
        ("ppo", {"clip_high_threshold": 0.2}, "around 1.*they are 0.2 and 0.8"),
        ("cispo", {"clip_high_threshold": 0.0}, "above 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    name: str, config: dict[str, float], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        loss_spec(name, config)


# ---- metrics


def spec_of(body: ForwardBackward) -> LossSpec:
    assert isinstance(body.loss, LossSpec)
    return body.loss


def metrics_of(body: ForwardBackward, rows: slice = slice(None)) -> dict[str, float]:
    rng = np.random.default_rng(9)
    lps = [rng.normal(-6, 0.4, d.target_tokens.shape).astype(np.float32) for d in body.data]
    losses = [float(i) for i in range(len(body.data))]
    return loss_metrics(spec_of(body), body.data[rows], lps[rows], losses[rows])


@pytest.mark.parametrize("name", LossName)
def test_metrics_combine_as_their_suffix_says(name: LossName) -> None:
    """The official SDK's rules: means are weighted by the number of data of a request."""
    body = batch(np.random.default_rng(0), (5, 17, 1, 9), name)
    whole, first, second = (metrics_of(body, slice(*ends)) for ends in [(4,), (1,), (1, 4)])
    assert whole.keys() == first.keys() == second.keys()
    for key, value in whole.items():
        _, suffix = key.split(":")
        both = first[key], second[key]
        combined = {"sum": sum(both), "max": max(both), "mean": (both[0] + 3 * both[1]) / 4}[suffix]
        assert value == pytest.approx(combined, rel=1e-12), key


@pytest.mark.parametrize("name", OFF_POLICY)
def test_metrics_of_a_policy_that_has_not_moved(name: LossName) -> None:
    rng = np.random.default_rng(0)
    body = batch(rng, (6, 3), name)
    lps = [datum.loss_inputs["logprobs"] for datum in body.data]
    metrics = loss_metrics(spec_of(body), body.data, lps, [1.0, 2.0])
    assert (metrics["ratio:mean"], metrics["ratio:max"]) == (1.0, 1.0)
    assert (metrics["kl_k1:mean"], metrics["kl_k3:mean"]) == (0.0, 0.0)
    assert metrics.get("clip_fraction:mean", 0.0) == 0.0
    assert metrics["sampler_entropy:mean"] == pytest.approx(np.log(512), rel=0.2)
    assert (metrics["loss:sum"], metrics["tokens:sum"]) == (3.0, 9.0)


def test_metrics_count_the_tokens_that_the_loss_counts() -> None:
    ratio = np.array([8.0, 0.5, 2.0, 1.0])
    q = np.full(4, -3.0, np.float32)
    datum = Datum(
        tokens=np.zeros(4, np.int32),
        target_tokens=np.zeros(4, np.int64),
        loss_inputs={
            "logprobs": q,
            "advantages": np.array([0.0, 1.0, 1.0, -1.0], np.float32),
            "weights": np.array([1.0, 0.5, 1.0, 1.0], np.float32),
        },
    )
    (lp,) = [(q + np.log(ratio)).astype(np.float32)]
    metrics = loss_metrics(loss_spec("ppo", {}), [datum], [lp], [-1.5])
    assert metrics["loss_tokens:sum"] == 3.0
    assert metrics["loss_per_token:mean"] == -0.5
    assert metrics["ratio:max"] == pytest.approx(2.0)
    assert metrics["ratio:mean"] == pytest.approx(3.5 / 3)
    assert metrics["kl_k1:mean"] == pytest.approx(0.0, abs=1e-6)  # -log(0.5 * 2)
    assert metrics["kl_k3:mean"] == pytest.approx(0.5 / 3, rel=1e-5)  # (0.5 + 2 + 1) - 3
    # 0.5 with a positive advantage is on its way back; 2.0 is beyond the bound.
    assert metrics["clip_fraction:mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", OFF_POLICY)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_metrics_are_finite_whatever_the_inputs(name: LossName, weight: float) -> None:
    rng = np.random.default_rng(0)
    body = batch(rng, (4,), name)
    inputs = dict(body.data[0].loss_inputs)
    inputs["logprobs"] = np.array([-1e30, -1e4, 1e4, -3], np.float32)
    inputs["weights"] = np.full(4, weight, np.float32)
    datum = replace(body.data[0], loss_inputs=inputs)
    lp = np.full(4, -5.0, np.float32)
    metrics = loss_metrics(spec_of(body), [datum], [lp], [0.0])
    assert all(math.isfinite(value) for value in metrics.values())
    if not weight:
        assert metrics["ratio:max"] == metrics["ratio:mean"] == 1.0
