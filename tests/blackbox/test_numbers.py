"""The service's numbers against plain PyTorch, transformers and PEFT, all in float32."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tinker
import torch
from tinker import types

from tests.blackbox import plain
from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, datum, logprobs, random_tokens, train_one_step
from tests.blackbox.plain import PlainRun
from tests.blackbox.saved import arrays, distance, folder_of, identical, moved, weights_of
from twinkle_dask import LocalService

PlainLoss = Callable[[types.Datum, torch.Tensor], torch.Tensor]

# AdamW with this step is gradient descent: it moves by g / (|g| + eps) * eps, which is g.
DESCENT = types.AdamParams(learning_rate=1e8, beta1=0.0, beta2=0.0, eps=1e8)

peft_model: Any = peft.PeftModel


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return plain.load(model_folder)


@pytest.fixture
def trained(client: tinker.ServiceClient) -> str:
    """A checkpoint whose adapter says something in every module: no B is zero any more."""
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    for seed in range(3):
        train_one_step(run, batch(seed=seed), lr=2e-2)
    return run.save_state("trained").result().path


def policy_data(run: tinker.TrainingClient) -> list[types.Datum]:
    """Data for policy losses: ratios below, within and above the clips, advantages of both signs.

    Every combination occurs, so both sides of the clip are active and inactive somewhere.
    """
    rng = np.random.default_rng(0)
    sequences = [random_tokens(25 + 7 * i, seed=50 + i) for i in range(3)]
    now = run.forward([datum(tokens) for tokens in sequences], "cross_entropy").result()
    data: list[types.Datum] = []
    for tokens, lp in zip(sequences, logprobs(now), strict=True):
        ratio = rng.choice([0.4, 0.7, 0.9, 1.1, 1.3, 2.0], len(lp))
        advantages = rng.normal(size=len(lp))
        for clipped in ((ratio > 1.2) & (advantages > 0), (ratio < 0.8) & (advantages < 0)):
            assert clipped.any()
        data.append(datum(tokens, weights=None, logprobs=lp - np.log(ratio), advantages=advantages))
    return data


def sequence_data(run: tinker.TrainingClient) -> list[types.Datum]:
    """The same with a mask that leaves out the first third; sequences on both sides of the clip."""
    data: list[types.Datum] = []
    for one in policy_data(run):
        length = len(one.model_input.to_ints())
        mask = np.arange(length) >= length // 3
        inputs = {"sequence_ratio_mask": types.TensorData.from_numpy(mask.astype(np.float32))}
        data.append(
            types.Datum(
                model_input=one.model_input, loss_fn_inputs={**one.loss_fn_inputs, **inputs}
            )
        )
    return data


def supervised_data(_run: tinker.TrainingClient) -> list[types.Datum]:
    """Negative and fractional weights, a different length each."""
    rng = np.random.default_rng(1)
    lengths = (30, 7, 2, 45)
    return [
        datum(random_tokens(length, seed=length), weights=rng.normal(size=length - 1))
        for length in lengths
    ]


def many_targets(_run: tinker.TrainingClient) -> list[types.Datum]:
    rng = np.random.default_rng(2)
    data: list[types.Datum] = []
    for length in (12, 5):
        inputs = {
            "target_tokens": rng.integers(0, 4096, (length, 3)),
            "weights": rng.normal(size=(length, 3)).astype(np.float32),
        }
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(random_tokens(length, seed=length)),
                loss_fn_inputs={k: types.TensorData.from_numpy(v) for k, v in inputs.items()},
            )
        )
    return data


@pytest.mark.parametrize(
    ("loss", "config", "make", "reference"),
    [
        ("cross_entropy", None, supervised_data, plain.cross_entropy),
        ("cross_entropy", None, many_targets, plain.cross_entropy),
        ("importance_sampling", None, policy_data, plain.importance_sampling),
        ("ppo", None, policy_data, plain.ppo),
        (
            "ppo",
            {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05},
            policy_data,
            partial(plain.ppo, low=0.5, high=1.05),
        ),
        ("cispo", None, policy_data, plain.cispo),
        (
            "cispo",
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            policy_data,
            partial(plain.cispo, low=0.8, high=1.2),
        ),
        ("dro", None, policy_data, plain.dro),
        ("gspo", None, sequence_data, plain.gspo),
        (
            "gspo",
            {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0},
            sequence_data,
            partial(plain.gspo, low=0.5, high=2.0),
        ),
        (
            "stable_reinforce",
            {"kl_coeff": 0.5, "clip_high_threshold": 1.2},
            policy_data,
            partial(plain.stable_reinforce, kl_coeff=0.5, high=1.2),
        ),
    ],
    ids=[
        "cross_entropy",
        "many_targets",
        "importance_sampling",
        "ppo",
        "ppo_other_clips",
        "cispo",
        "cispo_other_clips",
        "dro",
        "gspo",
        "gspo_other_clips",
        "stable_reinforce",
    ],
)
def test_logprobs_loss_and_gradient(
    client: tinker.ServiceClient,
    service: LocalService,
    model: Any,
    trained: str,
    loss: types.LossFnType,
    config: dict[str, float] | None,
    make: Callable[[tinker.TrainingClient], list[types.Datum]],
    reference: PlainLoss,
) -> None:
    run = client.create_training_client_from_state(trained).result()
    expected = PlainRun(model, folder_of(service, trained))
    data = make(run)
    output = run.forward_backward(data, loss, config).result()
    lps = [expected.logprobs(one) for one in data]
    total = torch.stack([reference(one, lp) for one, lp in zip(data, lps, strict=True)]).sum()
    for ours, theirs in zip(logprobs(output), lps, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert output.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-4, abs=1e-4)

    gradient = expected.gradient(total)
    step = run.optim_step(DESCENT).result()
    assert step.metrics is not None
    norm = np.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in gradient.values()))
    assert step.metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)
    downhill = moved(expected.weights, weights_of(service, run, "after"))
    # Float32 sums in another order: seen are 5e-6 over all, 2e-5 in a single matrix.
    assert distance(downhill, gradient) < 5e-5
    for name in gradient:
        assert distance({name: downhill[name]}, {name: gradient[name]}) < 2e-4, name


def test_a_custom_loss_is_differentiated(
    client: tinker.ServiceClient, service: LocalService, model: Any, trained: str
) -> None:
    """A preference loss over two data: the gradient of one depends on the other."""

    def loss(
        data: Sequence[types.Datum], lps: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        margin = lps[0].mean() - lps[1].mean()
        return -torch.nn.functional.logsigmoid(3 * margin), {"margin:mean": margin.item()}

    run = client.create_training_client_from_state(trained).result()
    expected = PlainRun(model, folder_of(service, trained))
    data = batch(num=2, seed=9)
    output = run.forward_backward_custom(data, loss).result()
    value, metrics = loss(data, [expected.logprobs(one) for one in data])
    assert output.metrics["loss:sum"] == pytest.approx(value.item(), rel=1e-5)
    assert output.metrics["margin:mean"] == pytest.approx(metrics["margin:mean"], abs=1e-5)
    run.optim_step(DESCENT).result()
    downhill = moved(expected.weights, weights_of(service, run, "after"))
    assert distance(downhill, expected.gradient(value)) < 1e-3


@pytest.mark.parametrize(
    "adam",
    [
        types.AdamParams(learning_rate=1e-2),
        types.AdamParams(learning_rate=5e-3, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.1),
        types.AdamParams(learning_rate=1e-2, eps=1e-6, grad_clip_norm=0.5),
    ],
    ids=["defaults", "weight_decay", "clipped"],
)
def test_five_steps_of_adamw(
    client: tinker.ServiceClient, service: LocalService, model: Any, adam: types.AdamParams
) -> None:
    """From a fresh adapter, two accumulated batches a step, weights compared at the end."""
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    path = run.save_state("start").result().path
    expected = PlainRun(model, folder_of(service, path))
    start = expected.weights
    leaves = list(expected.leaves.values())
    optimizer: Any = torch.optim.AdamW(
        leaves,
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    most = adam.grad_clip_norm or float("inf")
    for step in range(5):
        parts = [batch(num=2, seed=2 * step + i) for i in range(2)]
        pending = [run.forward_backward(part, "cross_entropy") for part in parts]
        metrics = run.optim_step(adam).result().metrics
        losses = [
            plain.cross_entropy(one, expected.logprobs(one)) for part in parts for one in part
        ]
        loss = torch.stack(losses).sum()
        ours = sum(future.result().metrics["loss:sum"] for future in pending)
        assert ours == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(leaves, most)
        optimizer.step()
        assert metrics is not None
        assert metrics["grad_norm:mean"] == pytest.approx(float(norm), rel=1e-4)
    way = moved(expected.weights, start)
    # Seen are 2e-5. More room, as Adam divides each entry by its own size: where a gradient is all
    # rounding, so is the step.
    assert distance(moved(weights_of(service, run, "end"), start), way) < 1e-3


def test_saved_and_resumed_equals_never_stopped(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    """Weights and moments, bit for bit."""
    straight = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    for seed in range(2):
        train_one_step(straight, batch(seed=seed))
    path = straight.save_state("middle").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    ends: list[Path] = []
    for run in (straight, resumed):
        for seed in range(2, 5):
            train_one_step(run, batch(seed=seed))
        ends.append(folder_of(service, run.save_state("end").result().path))
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = (arrays(end / file) for end in ends)
        assert identical(first, second), file


def test_sampler_and_trainer_agree(client: tinker.ServiceClient, trained: str) -> None:
    run = client.create_training_client_from_state(trained).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = random_tokens(15, seed=5)
    params = types.SamplingParams(max_tokens=30, temperature=1.0, seed=1, stop=[])
    drawn = sampler.sample(types.ModelInput.from_ints(prompt), 3, params).result()
    for sequence in drawn.sequences:
        assert sequence.logprobs is not None
        assert len(sequence.tokens) == len(sequence.logprobs) == 30
        whole = prompt + list(sequence.tokens)
        (lp,) = logprobs(run.forward([datum(whole)], "cross_entropy").result())
        np.testing.assert_allclose(sequence.logprobs, lp[len(prompt) - 1 :], atol=1e-4)
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
        assert scored[0] is None
        np.testing.assert_allclose(np.asarray(scored[1:], np.float32), lp, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_a_checkpoint_is_a_peft_adapter(
    client: tinker.ServiceClient,
    service: LocalService,
    model_folder: Path,
    trained: str,
    kind: str,
) -> None:
    run = client.create_training_client_from_state(trained).result()
    save = run.save_state if kind == "weights" else run.save_weights_for_sampler
    folder = folder_of(service, save("peft").result().path)
    base = plain.load(model_folder)
    adapted = peft_model.from_pretrained(base, str(folder)).eval()
    modules = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")}
    assert len(modules) == 4 * 7 + 1  # layers x projections, and the head
    data = batch(num=3, length=40, seed=4)
    ours = logprobs(run.forward(data, "cross_entropy").result())
    for one, lp in zip(data, ours, strict=True):
        with torch.no_grad():
            logits = adapted(torch.tensor(one.model_input.to_ints())[None]).logits[0]
        theirs = torch.log_softmax(logits, -1).gather(
            1, plain.tensor(one, "target_tokens")[:, None]
        )
        np.testing.assert_allclose(lp, theirs[:, 0].numpy(), rtol=1e-5, atol=1e-5)
