"""Training through the official SDK beside what ``acceptance`` asks for: policies, mistakes."""

import numpy as np
import pytest
import tinker
from tinker import types

from tests.blackbox.data import batch, datum, logprobs, random_tokens, train_one_step
from tests.blackbox.training import STEP, new_run, spent
from tests.blackbox.wire import Wire


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return new_run(client)


# ---- losses of rollouts


POLICY_LOSSES: list[types.LossFnType] = [
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "gspo",
    "stable_reinforce",
]
POLICY_METRICS = {
    "loss:sum",
    "tokens:sum",
    "loss_tokens:sum",
    "loss_per_token:mean",
    "kl_k1:mean",
    "kl_k3:mean",
    "ratio:mean",
    "ratio:max",
    "sampler_entropy:mean",
}
CLIPPED = {"ppo", "cispo", "gspo", "stable_reinforce"}


def rollouts(
    loss: types.LossFnType,
    tokens: list[list[int]],
    sampled: list[np.ndarray],
    advantages: list[float],
) -> list[types.Datum]:
    """Data whose second half was sampled; the first is a prompt of weight 0."""
    data: list[types.Datum] = []
    for sequence, lp, advantage in zip(tokens, sampled, advantages, strict=True):
        is_sampled = (np.arange(len(lp)) >= len(lp) // 2).astype(np.float32)
        inputs = {"logprobs": lp, "advantages": advantage * is_sampled, "weights": is_sampled}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = is_sampled
        data.append(datum(sequence, **inputs))
    return data


def on_policy(
    run: tinker.TrainingClient, loss: types.LossFnType, advantages: list[float]
) -> list[types.Datum]:
    """Rollouts of random tokens with the logprobs that the run gives them now."""
    tokens = [random_tokens(9 + i % 3, seed=i) for i in range(len(advantages))]
    forward = run.forward([datum(sequence) for sequence in tokens], "cross_entropy").result()
    return rollouts(loss, tokens, logprobs(forward), advantages)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_an_advantage_says_where_the_logprobs_go(
    run: tinker.TrainingClient, loss: types.LossFnType
) -> None:
    advantages = [1.0, -1.0]
    data = on_policy(run, loss, advantages)
    outputs: list[types.ForwardBackwardOutput] = []
    for _ in range(2):
        pending = run.forward_backward(data, loss)
        run.optim_step(types.AdamParams(learning_rate=1e-3))
        outputs.append(pending.result())
    for before, after, advantage in zip(*map(logprobs, outputs), advantages, strict=True):
        half = len(before) // 2
        assert (after[half:].sum() - before[half:].sum()) * advantage > 0
    first, second = (output.metrics for output in outputs)
    assert first.keys() == second.keys()
    assert first.keys() == POLICY_METRICS | ({"clip_fraction:mean"} if loss in CLIPPED else set())
    assert first["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert first["kl_k3:mean"] == pytest.approx(0.0, abs=1e-4)
    assert second["kl_k3:mean"] > first["kl_k3:mean"]
    assert second["ratio:max"] > 1.0
    lengths = [len(lp) for lp in logprobs(outputs[1])]
    assert second["loss_tokens:sum"] == sum(length - length // 2 for length in lengths)


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_thresholds_for_each_token_go_before_the_settings(
    client: tinker.ServiceClient, loss: types.LossFnType
) -> None:
    by_settings, by_token = new_run(client), new_run(client)
    data = on_policy(by_settings, loss, [1.0, -1.0])
    for run in (by_settings, by_token):
        run.forward_backward(data, loss).result()
        run.optim_step(STEP).result()
    bounds = {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}
    expected = by_settings.forward_backward(data, loss, bounds).result()
    assert expected.metrics["clip_fraction:mean"] > 0
    for one in data:
        for name, value in bounds.items():
            full = np.full(len(one.loss_fn_inputs["weights"].data), value, np.float32)
            one.loss_fn_inputs[name] = types.TensorData.from_numpy(full)
    output = by_token.forward_backward(data, loss).result()
    assert output.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-6)
    assert spent(by_token) == pytest.approx(spent(by_settings), rel=1e-5)


@pytest.mark.parametrize("loss", ["gspo", "stable_reinforce"])
def test_metrics_of_many_requests_are_those_of_one(
    client: tinker.ServiceClient, wire: Wire, loss: types.LossFnType
) -> None:
    """The SDK cuts these data into two requests and combines what comes back."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(10, 4096, 3 + i % 3).tolist() for i in range(1100)]
    sampled = [rng.normal(-8.3, 0.2, len(sequence) - 1) for sequence in tokens]
    data = rollouts(loss, tokens, sampled, rng.normal(size=1100).tolist())
    chunked, whole = new_run(client), new_run(client)
    future = chunked.forward_backward(data, loss)
    metrics = wire.metrics(wire.forward_backward(whole.model_id, 1, data, loss))
    assert future.result().metrics == pytest.approx(metrics, rel=1e-4)
    step = wire.result(wire.optim_step(whole.model_id, 2))
    assert spent(chunked) == pytest.approx(step["metrics"]["grad_norm:mean"], rel=1e-4)


def test_metrics_of_a_step(run: tinker.TrainingClient) -> None:
    run.forward_backward(batch(), "cross_entropy").result()
    metrics = run.optim_step(STEP).result().metrics
    assert metrics is not None
    assert metrics["learning_rate:mean"] == 1e-2
    assert metrics["step:max"] == 1.0
    assert 0 < metrics["update_norm:mean"] < metrics["weight_norm:mean"]


# ---- mistakes and gaps


def test_a_loss_without_a_value_fails_alone(run: tinker.TrainingClient) -> None:
    """It is only known on the host, so it fails as a result, and what is behind it goes on."""
    tokens = random_tokens(6, seed=1)
    lp = np.full(5, -1e4)  # a ratio of e to the ten thousand
    data = [datum(tokens, weights=None, logprobs=lp, advantages=np.ones(5))]
    good = run.forward_backward(batch(), "cross_entropy")
    bad = run.forward_backward(data, "importance_sampling")
    step = run.optim_step(STEP)
    with pytest.raises(tinker.RequestFailedError, match="datum 0 is -inf") as failed:
        bad.result()
    assert failed.value.category == types.RequestErrorCategory.User
    step.result()
    assert train_one_step(run, batch()) < good.result().metrics["loss:sum"]


def test_a_run_that_diverged_disturbs_nobody(client: tinker.ServiceClient) -> None:
    broken, sound, alone = new_run(client), new_run(client), new_run(client)
    expected = [train_one_step(alone, batch()) for _ in range(3)]
    train_one_step(broken, batch(), lr=1e30)
    losses: list[tinker.APIFuture[types.ForwardBackwardOutput]] = []
    hopeless: list[tinker.APIFuture[types.ForwardBackwardOutput]] = []
    for _ in range(3):
        hopeless.append(broken.forward_backward(batch(num=8), "cross_entropy"))
        losses.append(sound.forward_backward(batch(), "cross_entropy"))
        sound.optim_step(STEP)
    for future in hopeless:
        with pytest.raises(tinker.RequestFailedError, match="diverge"):
            future.result()
    assert [one.result().metrics["loss:sum"] for one in losses] == pytest.approx(expected, rel=1e-5)


def test_a_number_that_was_passed_over_comes_too_late(
    run: tinker.TrainingClient, wire: Wire
) -> None:
    wire.result(wire.optim_step(run.model_id, 2))
    late = wire.post(
        "optim_step", {"model_id": run.model_id, "seq_id": 1, "adam_params": {"eps": 1e-8}}
    )
    assert late.status_code == 400
    assert "too late" in late.json()["detail"]
