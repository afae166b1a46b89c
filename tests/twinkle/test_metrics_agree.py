"""Every metric by class name against Twinkle's own class, over several ragged batches.

Numbers in texts agree as texts; floats up to Twinkle's float32.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import twinkle.metric as theirs

from twinkle_dask import metrics
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.metrics import Facts

NOW = 1_000_000.0


def rows(draw: np.random.Generator, number: int = 4) -> list[np.ndarray]:
    labels = [draw.integers(0, 20, n).astype(np.int64) for n in draw.integers(2, 9, number)]
    for row in labels:
        row[: draw.integers(0, len(row))] = -100
    return labels


def padded(parts: Sequence[np.ndarray], fill: float) -> torch.Tensor:
    width = max(len(part) for part in parts)
    rows_ = [np.pad(part, (0, width - len(part)), constant_values=fill) for part in parts]
    return torch.tensor(np.stack(rows_))


def told(name: str, settings: dict[str, Any], passes: Sequence[Facts], now: float = NOW) -> Any:
    state = metrics.new(name, settings, NOW)
    for facts in passes:
        metrics.check(state, facts.labels, facts.arguments)
        # As a JSON column keeps it.
        state = json.loads(json.dumps(metrics.accumulate(state, facts), allow_nan=False))
    answer = metrics.result(state, now)
    fresh = metrics.reset(state, now)
    if name != "TrainMetric":
        assert fresh == metrics.new(name, settings, now)
    return answer


def same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        elif isinstance(value, list):
            for one, other in zip(ours[name], value, strict=True):
                same(one, other)
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize("summed", [True, False])
def test_loss(summed: bool) -> None:
    metric = theirs.LossMetric(None, None)
    passes: list[Facts] = []
    for loss, tokens, norm in ((40.25, 7, None), (12.5, 3, 0.27072)):
        passes.append(
            Facts(loss=loss, summed=summed, num_counted=tokens if summed else 1, grad_norm=norm)
        )
        metric.accumulate(
            {},
            {"loss": loss, "num_tokens": tokens if summed else 0},
            loss_reduction="sum" if summed else "mean",
            grad_norm=norm,
        )
    passes.append(Facts(loss=None))
    metric.accumulate({}, {})
    same(told("LossMetric", {}, passes), metric.calculate())


def test_a_loss_that_is_no_number_is_told_and_forgotten() -> None:
    assert told("LossMetric", {}, [Facts(loss=float("nan"))]) == {"loss": "nan"}
    assert told("LossMetric", {}, []) == {"loss": "0.0000"}


def test_accuracy() -> None:
    draw = np.random.default_rng(0)
    metric = theirs.Accuracy(None, None)
    passes: list[Facts] = []
    for _ in range(2):
        labels = rows(draw)
        logits = torch.tensor(draw.normal(0, 1, (4, max(map(len, labels)), 20)))
        wanted = padded(labels, -100)
        logits[(wanted % 2) == 0] += 100 * torch.nn.functional.one_hot(
            wanted[(wanted % 2) == 0].clamp(min=0), 20
        )
        hit = logits.argmax(-1).numpy()
        correct = [
            np.asarray(row[: len(part)] == part) for row, part in zip(hit, labels, strict=True)
        ]
        passes.append(Facts(labels=labels, correct=correct))
        metric.accumulate({"labels": wanted}, {"logits": logits})
    same(told("Accuracy", {}, [*passes, Facts(labels=labels)]), metric.calculate())
    assert told("Accuracy", {}, []) == {}


@pytest.mark.parametrize("rates", [[1e-4], [1e-4, 2.5e-5], []], ids=str)
@pytest.mark.parametrize("later_s", [2.0, 90.0])
def test_training(rates: list[float], later_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW]
    monkeypatch.setattr("time.time", lambda: clock[0])
    metric = theirs.TrainMetric()
    passes: list[Facts] = []
    for gradients in (3, 4, 8):
        passes.append(Facts(learning_rates=rates, gradients=gradients, accumulation=2))
        metric.accumulate({}, {}, lr=list(rates), step=gradients, gradient_accumulation_steps=2)
    clock[0] += later_s
    same(told("TrainMetric", {}, passes, NOW + later_s), metric.calculate())


def test_training_goes_on_after_it_was_told() -> None:
    state = metrics.new("TrainMetric", {}, NOW)
    state = metrics.accumulate(state, Facts(gradients=4))
    state = metrics.accumulate(metrics.reset(state, NOW + 8), Facts(gradients=6))
    assert metrics.result(state, NOW + 10) == {
        "iters": 6,
        "total time elapse": "10 seconds",
        "speed": "1.00 iters/s",
    }


@pytest.mark.parametrize("reference", ["ref_outputs", None])
def test_preferences(reference: str | None) -> None:
    draw = np.random.default_rng(1)
    metric = theirs.DPOMetric(None, None, beta=0.3)
    passes: list[Facts] = []
    for _ in range(3):
        labels = rows(draw)
        logps = [-draw.gamma(1.0, 1.0, len(row)).astype(np.float32) for row in labels]
        refs = padded([-draw.gamma(1.0, 1.0, len(row)) for row in labels], 0.0)
        sent = {reference: {"logps": refs.tolist()}} if reference else {}
        passes.append(Facts(labels=labels, logprobs=logps, arguments=sent))
        # Nested lists are what HTTP can carry, and what Twinkle's metric breaks on.
        theirs_ = {reference: {"logps": refs}} if reference else {}
        metric.accumulate({"labels": padded(labels, -100)}, {"logps": padded(logps, 0)}, **theirs_)
    same(told("DPOMetric", {"beta": 0.3}, passes), metric.calculate())
    assert told("DPOMetric", {}, []) == {}


def test_preferences_refuse_what_is_no_pair_before_the_pass() -> None:
    state = metrics.new("DPOMetric", {}, NOW)
    with pytest.raises(InvalidRequest, match="even, not 3"):
        metrics.check(state, rows(np.random.default_rng(0), 3), {})
    with pytest.raises(InvalidRequest, match="has 1 entries"):
        metrics.check(state, rows(np.random.default_rng(0), 2), {"ref_logps": [[0.0]]})


@pytest.mark.parametrize("name", ["GRPOMetric", "PPOMetric", "GSPOMetric", "CISPOMetric"])
@pytest.mark.parametrize("have", [(), ("old_logps",), ("old_logps", "advantages")], ids=str)
def test_policies(name: str, have: tuple[str, ...]) -> None:
    draw = np.random.default_rng(2)
    settings = {"epsilon": 0.1, "epsilon_high": 0.2, "temperature": 0.7, "top_k_kl": 3}
    metric = getattr(theirs, name)(**settings)
    passes: list[Facts] = []
    for _ in range(3):
        labels = rows(draw)
        logps = [-draw.gamma(1.0, 1.0, len(row)).astype(np.float32) for row in labels]
        old = [
            (lp[row != -100] + draw.normal(0, 0.3, (row != -100).sum())).tolist()
            for lp, row in zip(logps, labels, strict=True)
        ]
        given = {"old_logps": old, "advantages": draw.normal(0, 1, 4).tolist()}
        sent = {key: given[key] for key in have}
        passes.append(Facts(labels=labels, logprobs=logps, arguments=sent))
        metric.accumulate({"labels": padded(labels, -100)}, {"logps": padded(logps, 0)}, **sent)
    same(told(name, settings, passes), metric.calculate())
    assert told(name, {}, []) == {}


def test_rewards() -> None:
    metric = theirs.CompletionRewardMetric()
    passes = [
        {"rewards": {"format": [0.5, 1.0], "math": [1.0]}, "completion_lengths": [7, 9]},
        {"rewards": {"format": [0.25]}, "generate_time": 1.5, "weight_sync_time": 0.5},
        {"generate_time": 2.5, "completion_lengths": [12]},
    ]
    for sent in passes:
        metric.accumulate(**sent)
    facts = [Facts(arguments=sent) for sent in passes]
    same(told("CompletionRewardMetric", {}, facts), metric.calculate())


def test_embeddings() -> None:
    draw = np.random.default_rng(3)
    metric = theirs.EmbeddingMetric(None, None)
    passes: list[Facts] = []
    for loss in (1.25, 0.75):
        labels = [1, 0, 0, 1, 0, 1, 0]
        raw = draw.normal(0, 1, (7, 5)).astype(np.float32)
        raw /= np.linalg.norm(raw, axis=1, keepdims=True)
        passes.append(
            Facts(
                labels=[np.array([label]) for label in labels],
                embeddings=raw,
                loss=loss,
                grad_norm=0.5,
            )
        )
        metric.accumulate(
            {"labels": torch.tensor(labels)},
            {"embeddings": torch.tensor(raw), "loss": loss},
            grad_norm=0.5,
        )
    same(told("EmbeddingMetric", {}, passes), metric.calculate())
