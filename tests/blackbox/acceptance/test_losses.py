"""Losses and their gradients against plain PyTorch: items 18 to 32 of the protocol's checklist."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.blackbox import plain
from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, datum, logprobs, random_tokens
from tests.blackbox.plain import PlainRun
from tests.blackbox.saved import distance, folder_of, moved, weights_of
from tests.blackbox.training import DESCENT, STEP, new_run, spent, trained_checkpoint
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

PlainLoss = Callable[[types.Datum, torch.Tensor], torch.Tensor]
MakeData = Callable[[tinker.TrainingClient], list[types.Datum]]
Check = Callable[..., None]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return plain.load(model_folder)


@pytest.fixture
def trained(client: tinker.ServiceClient) -> str:
    return trained_checkpoint(client)


@pytest.fixture
def check(client: tinker.ServiceClient, service: LocalService, model: Any, trained: str) -> Check:
    """Compares logprobs, the loss and every gradient with a formula under autograd."""

    def compare(
        loss: types.LossFnType,
        make: MakeData,
        reference: PlainLoss,
        config: dict[str, float] | None = None,
    ) -> None:
        run = client.create_training_client_from_state(trained).result()
        expected = PlainRun(model, folder_of(service, trained))
        data = make(run)
        output = run.forward_backward(data, loss, config).result()
        lps = [expected.logprobs(one) for one in data]
        total = torch.stack([reference(one, lp) for one, lp in zip(data, lps, strict=True)]).sum()
        for ours, theirs in zip(logprobs(output), lps, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
        assert output.metrics["loss:sum"] == pytest.approx(
            float(total.detach()), rel=1e-4, abs=1e-4
        )
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

    return compare


# ---- data


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


# ---- the losses


def test_18_cross_entropy_has_the_gradient_of_its_formula(check: Check) -> None:
    check("cross_entropy", supervised_data, plain.cross_entropy)


def test_19_many_targets_a_position(check: Check) -> None:
    check("cross_entropy", many_targets, plain.cross_entropy)


def five_steps(
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


@pytest.mark.parametrize(
    "adam",
    [
        types.AdamParams(learning_rate=1e-2),
        types.AdamParams(learning_rate=5e-3, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.1),
    ],
    ids=["eps_1e-12", "weight_decay"],
)
def test_24_adamw_is_that_of_torch(
    client: tinker.ServiceClient, service: LocalService, model: Any, adam: types.AdamParams
) -> None:
    five_steps(client, service, model, adam)


def test_25_gradients_are_clipped_by_their_global_norm(
    client: tinker.ServiceClient, service: LocalService, model: Any
) -> None:
    adam = types.AdamParams(learning_rate=1e-2, eps=1e-6, grad_clip_norm=0.5)
    five_steps(client, service, model, adam)


def test_26_importance_sampling(check: Check) -> None:
    check("importance_sampling", policy_data, plain.importance_sampling)


def test_27_ppo_with_its_defaults(check: Check) -> None:
    """0.8 and 1.2."""
    check("ppo", policy_data, plain.ppo)


def test_27_ppo_with_other_thresholds(check: Check) -> None:
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}
    check("ppo", policy_data, partial(plain.ppo, low=0.5, high=1.05), config)


def test_28_cispo_with_its_defaults(check: Check) -> None:
    """0 and 4."""
    check("cispo", policy_data, plain.cispo)


def test_28_cispo_with_other_thresholds(check: Check) -> None:
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    check("cispo", policy_data, partial(plain.cispo, low=0.8, high=1.2), config)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_29_dro_with_beta(check: Check, beta: float | None) -> None:
    if beta is None:
        check("dro", policy_data, plain.dro)
    else:
        check("dro", policy_data, partial(plain.dro, beta=beta), {"beta": beta})


def test_30_gspo_with_a_mask(check: Check) -> None:
    check("gspo", sequence_data, plain.gspo)


def test_30_gspo_with_other_thresholds(check: Check) -> None:
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    check("gspo", sequence_data, partial(plain.gspo, low=0.5, high=2.0), config)


def test_30_stable_reinforce_is_ours(check: Check) -> None:
    """Not in the checklist, since its formula is not published; see docs/losses.md."""
    config = {"kl_coeff": 0.5, "clip_high_threshold": 1.2}
    reference = partial(plain.stable_reinforce, kl_coeff=0.5, high=1.2)
    check("stable_reinforce", policy_data, reference, config)


# ---- losses that clients define


def squares(
    data: list[types.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Its derivative is each logprob itself, so the weights that the SDK sends are positive."""
    return 0.5 * torch.cat(logprobs).square().sum(), {"data:sum": float(len(data))}


def test_32_a_custom_loss_has_its_own_gradient(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    tokens = [random_tokens(12 + i, seed=i) for i in range(3)]
    data = [datum(sequence) for sequence in tokens]
    custom, analytic = new_run(client), new_run(client)
    output = custom.forward_backward_custom(data, squares).result()
    forward = logprobs(analytic.forward(data, "cross_entropy").result())
    by_hand = [datum(sequence, weights=-lp) for sequence, lp in zip(tokens, forward, strict=True)]
    surrogate = analytic.forward_backward(by_hand, "cross_entropy").result()
    expected = sum(0.5 * float(np.square(lp).sum()) for lp in forward)
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert output.metrics["surrogate_loss:sum"] == pytest.approx(surrogate.metrics["loss:sum"])
    assert output.metrics["data:sum"] == 3
    assert spent(custom) == pytest.approx(spent(analytic), rel=1e-5)
    after = weights_of(service, custom, "after"), weights_of(service, analytic, "after")
    assert distance(*after) < 1e-3


def test_32_a_custom_loss_is_differentiated(
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


def ranked(
    logprobs: torch.Tensor, old: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ratios, pairs of positions, integers and a mask."""
    ratio = torch.exp(logprobs - old)
    surrogate = -torch.minimum(ratio, torch.clamp(ratio, 0.9, 1.1))[mask > 0].sum()
    better = (labels[:, None] > labels[None, :]).float()
    pairs = torch.nn.functional.softplus(logprobs[None, :] - logprobs[:, None]) * better
    loss = surrogate + pairs.sum() / logprobs.shape[0]
    return loss, {
        "custom/ratio:mean": ratio.mean(),
        "custom/marked:sum": (mask > 0).sum(),
    }


RANKS: dict[str, Any] = {"logprobs": 1, "old": 1, "labels": 1, "mask": 1}


def ranked_data(num: int = 3) -> list[types.Datum]:
    rng = np.random.default_rng(4)
    return [
        datum(
            random_tokens(length + 1, seed=length),
            weights=None,
            old=rng.normal(-8.3, 0.3, length),
            labels=rng.integers(0, 5, length),
            mask=np.append(rng.integers(0, 2, length - 1), 1).astype(np.float32),
            unread=np.ones(2),
        )
        for length in range(9, 9 + num)
    ]


def ask_clients_to_evaluate(client: tinker.ServiceClient) -> None:
    """As if the server had said that it does not compute custom losses."""
    holder: Any = client.holder
    off = {"custom_loss_server_side": False}
    holder._client_config = holder.get_client_config().model_copy(update=off)


def test_32_a_custom_loss_on_the_server_is_the_one_on_the_client(
    client: tinker.ServiceClient, service: LocalService, model: Any, trained: str
) -> None:
    """The same function with the flag on and off, and under autograd on a plain model."""
    data = ranked_data()
    outputs: list[types.ForwardBackwardOutput] = []
    gradients: list[Any] = []
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as another:
        ask_clients_to_evaluate(another)
        for side, uploaded in ((client, True), (another, False)):
            run = side.create_training_client_from_state(trained).result()
            start = weights_of(service, run, "start")
            loss = side.create_custom_loss(ranked, RANKS).result()
            assert (loss.loss_id is not None) == uploaded
            outputs.append(run.forward_backward_custom(data, loss).result())
            run.optim_step(DESCENT).result()
            gradients.append(moved(start, weights_of(service, run, "after")))
    server, own = outputs
    assert own.metrics.pop("surrogate_loss:sum")
    told = {"custom/ratio:mean", "custom/marked:sum", "loss:sum", "tokens:sum"}
    assert server.metrics.keys() == told
    assert server.metrics == pytest.approx({name: own.metrics[name] for name in told}, rel=1e-5)
    for ours, theirs in zip(logprobs(server), logprobs(own), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert distance(gradients[0], gradients[1]) < 5e-5
    expected = PlainRun(model, folder_of(service, trained))
    names = list(RANKS)[1:]
    values = [
        ranked(expected.logprobs(one), *(plain.tensor(one, name) for name in names))[0]
        for one in data
    ]
    assert server.metrics["loss:sum"] == pytest.approx(sum(v.item() for v in values), rel=1e-5)
    assert distance(gradients[0], expected.gradient(torch.stack(values).sum())) < 5e-5


def test_32_a_custom_loss_in_chunks_is_one_in_a_piece(client: tinker.ServiceClient) -> None:
    holder: Any = client.holder
    whole, chunked = new_run(client), new_run(client)
    loss = client.create_custom_loss(ranked, RANKS).result()
    data = ranked_data(5)
    expected = whole.forward_backward_custom(data, loss).result()
    holder._client_config = holder.get_client_config().model_copy(
        update={"fwdbwd_max_chunk_len": 2}
    )
    output = chunked.forward_backward_custom(data, loss).result()
    assert len(output.loss_fn_outputs) == 5
    assert output.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert spent(chunked) == pytest.approx(spent(whole), rel=1e-5)


def test_32_many_targets_and_a_scalar(client: tinker.ServiceClient) -> None:
    def distilled(
        logprobs: torch.Tensor, teacher: torch.Tensor, strength: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        wanted = torch.softmax(teacher, dim=-1)
        return -strength * (wanted * logprobs).sum(-1).mean(), {}

    rng = np.random.default_rng(0)
    inputs = {
        "target_tokens": types.TensorData.from_numpy(rng.integers(0, 4096, (6, 3))),
        "teacher": types.TensorData.from_numpy(rng.normal(size=(6, 3)).astype(np.float32)),
        "strength": types.TensorData(data=[0.5], dtype="float32", shape=[]),
    }
    prompt = types.ModelInput.from_ints(random_tokens(6, seed=1))
    data = [types.Datum(model_input=prompt, loss_fn_inputs=inputs)]
    ranks: Any = {"logprobs": 2, "teacher": 2, "strength": 0}
    loss = client.create_custom_loss(distilled, ranks).result()
    run = new_run(client)
    output = run.forward(data, "custom", {"loss_id": loss.loss_id}).result()  # pyright: ignore[reportArgumentType]
    (lp,) = logprobs(output)
    teacher = np.exp(inputs["teacher"].to_numpy())
    wanted = teacher / teacher.sum(-1, keepdims=True)
    expected = -0.5 * (wanted * lp).sum(-1).mean()
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert spent(run) == 0.0
    learned = run.forward_backward_custom(data, loss).result()
    assert learned.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert spent(run) > 0


def test_32_what_a_custom_loss_may_not_do_is_named(client: tinker.ServiceClient) -> None:
    def drawn(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (logprobs * torch.rand_like(logprobs)).sum(), {}

    with pytest.raises(tinker.BadRequestError, match=r"'torch\.rand_like' is not allowed"):
        client.create_custom_loss(drawn, {"logprobs": 1}).result()


def test_32_a_custom_loss_that_fails_fails_alone(client: tinker.ServiceClient) -> None:
    def divided(
        logprobs: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (logprobs / x).sum(), {}

    def wide(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logprobs.repeat(10**9).sum(), {}

    run = new_run(client)
    tokens = random_tokens(6, seed=1)
    loss = client.create_custom_loss(divided, {"logprobs": 1, "x": 1}).result()
    data = [datum(tokens, weights=None, x=[1.0] * 5), datum(tokens, weights=None, x=[0.0] * 5)]
    bad = run.forward_backward_custom(data, loss)
    too_much = run.forward_backward_custom(
        data, client.create_custom_loss(wide, {"logprobs": 1}).result()
    )
    step = run.optim_step(STEP)
    with pytest.raises(tinker.RequestFailedError, match="'divided' failed on datum 1") as failed:
        bad.result()
    assert failed.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="more work than is allowed"):
        too_much.result()
    assert step.result().metrics == {"grad_norm:mean": 0.0}
    assert run.forward_backward_custom(data[:1], loss).result().metrics["loss:sum"] < 0


GRAPH: dict[str, Any] = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_method", "name": "s", "target": "sum", "args": [{"ref": "logprobs"}]},
        {
            "op": "output",
            "name": "output",
            "target": "output",
            "args": [{"tuple": [{"ref": "s"}, {"dict": {}}]}],
        },
    ],
}
INPUTS = [{"name": "logprobs", "rank": 1}]


def test_32_a_custom_loss_is_made_once_and_is_its_sessions(
    client: tinker.ServiceClient, other_client: tinker.ServiceClient, wire: Wire
) -> None:
    session = client.holder.get_session_id()
    body = {
        "session_id": session,
        "custom_loss_seq_id": 40,
        "name": "total",
        "inputs": INPUTS,
        "graph": GRAPH,
        "type": "create_custom_loss",
    }
    loss = wire.result(wire.promise("create_custom_loss", body))["loss_id"]
    again = wire.result(wire.promise("create_custom_loss", body | {"name": "other"}))
    assert again["loss_id"] == loss
    different = wire.result(wire.promise("create_custom_loss", body | {"custom_loss_seq_id": 41}))
    assert different["loss_id"] != loss

    def forward(run: str, config: dict[str, Any]) -> httpx.Response:
        tensor = {"data": [1, 2], "dtype": "int64", "shape": [2]}
        one = {
            "model_input": {"chunks": [{"tokens": [1, 2]}]},
            "loss_fn_inputs": {"target_tokens": tensor},
        }
        sent = {"data": [one], "loss_fn": "custom", "loss_fn_config": config}
        return wire.post("forward", {"model_id": run, "forward_input": sent})

    run = new_run(client).model_id
    answer = forward(run, {"loss_id": loss})
    assert answer.status_code == 200, answer.text
    assert math.isfinite(wire.metrics(answer.json()["request_id"])["loss:sum"])
    for config in ({}, {"loss_id": 5}, {"loss_id": loss, "beta": 1.0}, {"loss_id": ""}):
        assert "'loss_id'" in refusal(forward(run, config), 400)
    assert "There is no custom loss" in refusal(forward(run, {"loss_id": "loss-0"}), 404)
    elsewhere = wire.post("create_session", {}).json()["session_id"]
    create = {"base_model": MODEL, "lora_config": {"rank": 1}}
    made = wire.promise("create_model", {"session_id": elsewhere, "model_seq_id": 0, **create})
    another = wire.result(made)["model_id"]
    assert "belongs to session" in refusal(forward(another, {"loss_id": loss}), 400)
    theirs = other_client.holder.get_session_id()
    refused = wire.post("create_custom_loss", body | {"session_id": theirs})
    assert "There is no session" in refusal(refused, 404)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"graph": {"format": 2, "nodes": []}}, "format"),
        ({"graph": {"nodes": []}}, "output"),
        ({"graph": {"nodes": [{"op": "output"}]}}, "name"),
        ({"graph": {"nodes": GRAPH["nodes"] * 200}}, "512 nodes"),
        ({"inputs": [{"name": "logprobs", "rank": 3}]}, "rank"),
        ({"inputs": [{"name": "x", "rank": 1}]}, "'logprobs'"),
        ({"name": "x" * 1000}, "characters"),
        ({"custom_loss_seq_id": -1}, "custom_loss_seq_id"),
    ],
)
def test_32_a_graph_that_is_none_is_refused(
    client: tinker.ServiceClient, wire: Wire, change: dict[str, Any], named: str
) -> None:
    body = {
        "session_id": client.holder.get_session_id(),
        "custom_loss_seq_id": 50,
        "name": "total",
        "inputs": INPUTS,
        "graph": GRAPH,
    }
    assert named in refusal(wire.post("create_custom_loss", body | change), 400)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["detail"]
