"""Losses by class name through the real client: their gradients, arguments and metrics."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import requests
from adapters import feature, lora
from twinkle_client.model import MultiLoraTransformersModel

X = -100
PAIRS: list[dict[str, Any]] = [
    {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [X, X, 6, 7, 8, X]},
    {"input_ids": [3, 4, 5, 9], "labels": [X, X, 9, X]},
    {"input_ids": [11, 12, 13, 14], "labels": [X, 13, 14, X]},
    {"input_ids": [11, 12, 17, 18, 19], "labels": [X, 17, 18, 19, X]},
]
NUM_TARGETS = [3, 1, 2, 3]
ROWS = [feature(3, 4, 5, 6, 7, 8), feature(9, 8, 7, 6, 5)]
_names = itertools.count()


@pytest.fixture
def tuned(model: MultiLoraTransformersModel) -> MultiLoraTransformersModel:
    """An adapter that is not the base model any more."""
    model.add_adapter_to_model(f"loss-{next(_names)}", lora())
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("AdamW", lr=2e-2)
    for _ in range(2):
        model.forward_backward(inputs=ROWS)
        model.clip_grad_and_step()
    return model


def targets_of(rows: list[list[float]]) -> list[list[float]]:
    """Values at the targets of ``PAIRS`` alone."""
    return [
        [value for value, label in zip(row, pair["labels"], strict=False) if label != X]
        for row, pair in zip(rows, PAIRS, strict=True)
    ]


def near(rows: list[list[float]], scale: float = 0.3) -> list[list[float]]:
    draw = np.random.default_rng(5)
    return [[x + float(draw.normal(0, scale)) for x in row] for row in rows]


def goes_down(model: MultiLoraTransformersModel, forward_backward: Callable[[], Any]) -> None:
    """A small step along the gradient lowers the loss by step times squared norm.

    That is first order: for a small change of losses that are computed from float32
    log-probabilities, curvature (some percent at 4e-4) and rounding (1e-6) are below a tenth.
    """
    change = 4e-4
    forward_backward()
    norm = float(model.clip_grad_norm(max_grad_norm=1e9).result)
    assert norm > 0
    model.zero_grad()
    model.set_optimizer("SGD", lr=change / norm**2)
    before = forward_backward().result["loss"]
    assert float(model.clip_grad_norm(max_grad_norm=1e9).result) == pytest.approx(norm, rel=1e-3)
    model.step()
    model.zero_grad()
    after = forward_backward().result["loss"]
    model.zero_grad()
    assert before - after == pytest.approx(change, rel=0.1)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(requests.HTTPError) as error:
        call()
    assert error.value.response is not None
    assert 400 <= error.value.response.status_code < 500
    return str(error.value)


def test_43_dpo_metric_appears(tuned: MultiLoraTransformersModel) -> None:
    reference = tuned.forward_only(inputs=PAIRS, disable_lora=True).result
    tuned.set_loss("DPOLoss", beta=0.2)
    tuned.add_metric("DPOMetric", is_training=True, beta=0.2)
    tuned.calculate_metric(is_training=True)
    policy = tuned.forward_backward(inputs=PAIRS, ref_outputs=reference).result["logps"]
    told = tuned.calculate_metric(is_training=True).result
    ours = [sum(row) for row in targets_of(policy)]
    theirs = [sum(row) for row in targets_of(reference["logps"])]
    rewards = [0.2 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    expected = {
        "logps/chosen": (ours[0] + ours[2]) / 2,
        "logps/rejected": (ours[1] + ours[3]) / 2,
        "logps/ref_chosen": (theirs[0] + theirs[2]) / 2,
        "rewards/margins": sum(margins) / 2,
    }
    for name, value in expected.items():
        assert float(told[name]) == pytest.approx(value, abs=6e-3 if "logps" in name else 6e-5)
    better = sum(margin > 0 for margin in margins)
    assert told["rewards/accuracies"] == f"{better / 2 * 100:.1f}%"
    # Told once, then anew; and the adapter goes on.
    assert "logps/chosen" not in tuned.calculate_metric(is_training=True).result
    tuned.forward_backward(inputs=PAIRS, ref_outputs=reference)
    assert "logps/chosen" in tuned.calculate_metric(is_training=True).result


def test_43_a_batch_that_a_metric_cannot_take_is_refused_before_its_pass(
    tuned: MultiLoraTransformersModel,
) -> None:
    tuned.add_metric("DPOMetric")
    assert "must be even, not 3" in refused(lambda: tuned.forward_backward(inputs=PAIRS[:3]))
    tuned.forward_backward(inputs=PAIRS)
    told = tuned.calculate_metric(is_training=True).result
    assert set(told) >= {"loss", "logps/chosen", "logps/rejected"}


def test_44_dpo_with_ref_outputs_from_forward_only(tuned: MultiLoraTransformersModel) -> None:
    reference = tuned.forward_only(inputs=PAIRS, disable_lora=True).result
    tuned.set_loss("DPOLoss", beta=0.5, sft_weight=0.1)
    goes_down(tuned, lambda: tuned.forward_backward(inputs=PAIRS, ref_outputs=reference))
    policy = targets_of(tuned.forward_only(inputs=PAIRS).result["logps"])
    known = targets_of(reference["logps"])
    gaps = [sum(a) - sum(b) for a, b in zip(policy, known, strict=True)]
    margins = np.array([gaps[0] - gaps[1], gaps[2] - gaps[3]])
    sft = -(sum(policy[0]) + sum(policy[2])) / (NUM_TARGETS[0] + NUM_TARGETS[2])
    loss = np.log1p(np.exp(-0.5 * margins)).mean() + 0.1 * sft
    given = tuned.forward_backward(inputs=PAIRS, ref_logps=reference["logps"]).result["loss"]
    # Two forwards of the same weights, float32 each.
    assert given == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPOLoss", {"loss_type": "ipo", "beta": 0.5, "reference_free": True}),
        ("SimPOLoss", {}),
        ("CPOLoss", {"beta": 0.4}),
        ("ORPOLoss", {"lambda_orpo": 1.0}),
    ],
    ids=str,
)
def test_44_preferences_without_a_reference(
    tuned: MultiLoraTransformersModel, name: str, settings: dict[str, Any]
) -> None:
    tuned.set_loss(name, **settings)
    goes_down(tuned, lambda: tuned.forward_backward(inputs=PAIRS))


def test_44_a_missing_reference_is_refused(tuned: MultiLoraTransformersModel) -> None:
    tuned.set_loss("DPOLoss")
    assert "ref_outputs" in refused(lambda: tuned.forward_backward(inputs=PAIRS))
    short = {"logps": [[-1.0, -1.0]] * 4}
    words = refused(lambda: tuned.forward_backward(inputs=PAIRS, ref_outputs=short))
    assert "Row 0" in words
    assert "has 2 values" in words


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GRPOLoss", {}),
        ("GRPOLoss", {"beta": 0.1}),
        ("PPOLoss", {}),
        ("GSPOLoss", {}),
        ("SAPOLoss", {}),
        ("BNPOLoss", {}),
        ("DRGRPOLoss", {"max_completion_length": 4}),
    ],
    ids=str,
)
def test_45_policies_with_ragged_old_logps_and_scalar_advantages(
    tuned: MultiLoraTransformersModel, name: str, settings: dict[str, Any]
) -> None:
    before = targets_of(tuned.forward_only(inputs=PAIRS).result["logps"])
    # Ratios within the clip, so that no kink is near.
    old, advantages = near(before, 0.02), [1.0, -0.5, 0.8, -1.2]
    tuned.set_loss(name, **settings)
    goes_down(
        tuned,
        lambda: tuned.forward_backward(
            inputs=PAIRS, advantages=advantages, old_logps=old, ref_logps=near(before, 0.1)
        ),
    )


def test_45_grpo_is_its_formula(tuned: MultiLoraTransformersModel) -> None:
    policy = targets_of(tuned.forward_only(inputs=PAIRS).result["logps"])
    old, advantages = near(policy), [1.0, -0.5, 0.8, -1.2]
    tuned.set_loss("GRPOLoss", epsilon=0.1)
    rows = []
    for new, was, advantage in zip(policy, old, advantages, strict=True):
        ratio = np.exp(np.array(new) - np.array(was))
        clipped = ratio.clip(0.9, 1.1)
        rows.append(-np.minimum(ratio * advantage, clipped * advantage).mean())
    given = tuned.forward_backward(inputs=PAIRS, advantages=advantages, old_logps=old).result
    assert given["loss"] == pytest.approx(np.mean(rows), abs=1e-5)
    assert targets_of(given["logps"]) == [pytest.approx(row, abs=1e-5) for row in policy]
    # A whole padded row says the same as its targets.
    padded = [
        [0.0] * pair["labels"].index(next(x for x in pair["labels"] if x != X)) + row
        for pair, row in zip(PAIRS, old, strict=True)
    ]
    padded = [row + [0.0] * (6 - len(row)) for row in padded]
    again = tuned.forward_backward(inputs=PAIRS, advantages=advantages, old_logps=padded).result
    assert again["loss"] == pytest.approx(given["loss"], abs=1e-6)


def test_45_metrics_of_a_policy(tuned: MultiLoraTransformersModel) -> None:
    policy = targets_of(tuned.forward_only(inputs=PAIRS).result["logps"])
    old = near(policy)
    tuned.set_loss("GRPOLoss")
    tuned.add_metric("GRPOMetric")
    tuned.forward_backward(inputs=PAIRS, advantages=[1.0, -0.5, 0.8, -1.2], old_logps=old)
    told = tuned.calculate_metric(is_training=True).result
    gaps = np.concatenate(policy) - np.concatenate(old)
    assert told["train/logp_diff_mean"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert told["train/approx_kl"] == pytest.approx((np.expm1(gaps) - gaps).mean(), abs=1e-5)
    assert 0 <= told["train/clip_ratio"] <= 1


def test_45_what_does_not_fit_is_named(tuned: MultiLoraTransformersModel) -> None:
    tuned.set_loss("GRPOLoss")
    assert "'advantages'" in refused(lambda: tuned.forward_backward(inputs=PAIRS))
    old = [[-1.0] * count for count in NUM_TARGETS]
    old[3] = [-1.0, -1.0]
    words = refused(
        lambda: tuned.forward_backward(inputs=PAIRS, advantages=[1.0] * 4, old_logps=old)
    )
    assert "Row 3: old_logps has 2 values" in words
    words = refused(lambda: tuned.forward_backward(inputs=PAIRS, advantage=[1.0] * 4))
    assert "'advantage'" in words


def test_46_chunked_cross_entropy_is_cross_entropy(tuned: MultiLoraTransformersModel) -> None:
    seen: list[tuple[float, float]] = []
    for name, settings in (
        ("CrossEntropyLoss", {}),
        ("ChunkedCrossEntropyLoss", {"chunk_size": 2}),
    ):
        tuned.set_loss(name, reduction="mean", **settings)
        loss = tuned.forward_backward(inputs=PAIRS).result["loss"]
        seen.append((loss, float(tuned.clip_grad_norm(max_grad_norm=1e9).result)))
        tuned.zero_grad()
    assert seen[0] == seen[1]
    policy = targets_of(tuned.forward_only(inputs=PAIRS).result["logps"])
    assert seen[0][0] == pytest.approx(-np.concatenate(policy).mean(), abs=1e-5)


def test_46_a_sum_counts_its_tokens(tuned: MultiLoraTransformersModel) -> None:
    norms: list[float] = []
    for reduction in ("sum", "mean"):
        tuned.set_loss("CrossEntropyLoss", reduction=reduction)
        tuned.forward_backward(inputs=PAIRS)
        norms.append(float(tuned.clip_grad_norm(max_grad_norm=1e9).result))
        tuned.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("MSELoss", {}, {"targets": [0.5, -1.0, [1.0, 0.0], 2.0]}),
        (
            "GKDLoss",
            {"temperature": 1.5},
            {
                "teacher_topk_logprobs": [[[-0.4, -1.5, -3.0]] * n for n in NUM_TARGETS],
                "teacher_topk_indices": [[[6, 7, 9]] * n for n in NUM_TARGETS],
            },
        ),
    ],
    ids=["mse", "gkd"],
)
def test_46_other_losses_of_tokens(
    tuned: MultiLoraTransformersModel,
    name: str,
    settings: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    tuned.set_loss(name, **settings)
    goes_down(tuned, lambda: tuned.forward_backward(inputs=PAIRS, **arguments))


def test_46_dft(tuned: MultiLoraTransformersModel) -> None:
    # Its curvature is too large for goes_down; test_losses_agree has its slopes.
    tuned.set_loss("CrossEntropyLoss", dft=True)
    policy = np.concatenate(targets_of(tuned.forward_only(inputs=PAIRS).result["logps"]))
    given = tuned.forward_backward(inputs=PAIRS).result["loss"]
    assert given == pytest.approx(-(np.exp(policy) * policy).mean(), abs=1e-5)
    assert float(tuned.clip_grad_norm(max_grad_norm=1e9).result) > 0


def test_46_what_is_not_computed_here(tuned: MultiLoraTransformersModel) -> None:
    assert "Chunked" in refused(lambda: tuned.set_loss("LigerFusedLinearCrossEntropyLoss"))
    assert "value head" in refused(lambda: tuned.set_loss("PPOValueLoss"))
    assert "entropy" in refused(lambda: tuned.set_loss("GRPOLoss", entropy_coef=0.1))
    assert "value head" in refused(lambda: tuned.add_metric("PPOValueMetric"))
    assert "'smoothing'" in refused(lambda: tuned.set_loss("CrossEntropyLoss", smoothing=0.1))


GROUPS: list[dict[str, Any]] = [
    {"input_ids": [3, 4, 5], "labels": [1]},
    {"input_ids": [3, 4, 6, 7], "labels": [0]},
    {"input_ids": [20, 21], "labels": [0]},
    {"input_ids": [11, 12, 13], "labels": [1]},
    {"input_ids": [11, 14], "labels": [0]},
    {"input_ids": [30, 31, 32], "labels": [0]},
]


def test_47_infonce_with_embeddings(tuned: MultiLoraTransformersModel) -> None:
    tuned.set_loss("InfonceLoss", temperature=0.2)
    tuned.add_metric("EmbeddingMetric")
    goes_down(tuned, lambda: tuned.forward_backward(inputs=GROUPS, task="embedding"))
    told = tuned.calculate_metric(is_training=True).result
    assert float(told["pos_sim_min"]) <= float(told["pos_sim"]) <= float(told["pos_sim_max"])
    tuned.set_optimizer("AdamW", lr=5e-3)
    losses: list[float] = []
    for _ in range(6):
        done = tuned.forward_backward(inputs=GROUPS, task="embedding").result
        losses.append(done["loss"])
        tuned.clip_grad_and_step()
    assert losses[-1] < losses[0] / 2


def test_47_groups_are_checked(tuned: MultiLoraTransformersModel) -> None:
    tuned.set_loss("InfonceLoss")
    words = refused(lambda: tuned.forward_backward(inputs=GROUPS[1:], task="embedding"))
    assert "begins none" in words
    tuned.set_loss("CrossEntropyLoss")
    words = refused(lambda: tuned.forward_backward(inputs=GROUPS, task="embedding"))
    assert "InfonceLoss" in words
